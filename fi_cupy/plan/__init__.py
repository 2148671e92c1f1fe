"""Host decisions as pure functions of NumPy arrays and integers: split-KV schedules, tile choice, workspace layout."""
