"""From kernel specification to a launch: render, compile, cache, load."""
