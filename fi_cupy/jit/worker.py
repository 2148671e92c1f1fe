"""The compiler child: reads jobs on standard input, compiles each with NVRTC, writes results to standard output.

It runs as a program of its own, imports nothing of fi_cupy, and may crash: NVRTC segfaults on some malformed sources,
and that must cost its parent an error message, not the process. Messages are pickles behind an 8-byte length.
"""

import os
import pickle
import struct
import sys
import time
from typing import Any


def compile_one(job: dict[str, Any]) -> dict[str, Any]:
    from cupy.cuda import nvrtc

    begin = time.perf_counter()
    headers = job["headers"]
    program = nvrtc.createProgram(
        job["source"], job["name"], tuple(headers.values()), tuple(name.encode() for name in headers)
    )
    try:
        try:
            nvrtc.compileProgram(program, tuple(job["options"]))
        except nvrtc.NVRTCError as error:
            return {"ok": False, "log": nvrtc.getProgramLog(program) or str(error)}
        log = nvrtc.getProgramLog(program)
        code = nvrtc.getPTX(program) if job["ptx"] else nvrtc.getCUBIN(program)
        # CuPy's getCUBIN leaves out the last byte (a zero): the driver does not mind, the disassembler does.
        return {
            "ok": True,
            "code": code if job["ptx"] else code + b"\0",
            "log": log,
            "seconds": time.perf_counter() - begin,
        }
    finally:
        nvrtc.destroyProgram(program)


def main() -> None:
    # The protocol owns the real standard output; whatever a library prints goes to standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = sys.stdin.buffer
    while True:
        head = source.read(8)
        if len(head) < 8:
            return
        job = pickle.loads(source.read(struct.unpack("<Q", head)[0]))
        try:
            if job.get("query") == "version":
                from cupy.cuda import nvrtc

                result = {"ok": True, "version": nvrtc.getVersion()}
            else:
                result = compile_one(job)
        except BaseException as error:  # reported, whatever it is
            result = {"ok": False, "log": f"{type(error).__name__}: {error}", "broken": True}
        blob = pickle.dumps(result)
        out.write(struct.pack("<Q", len(blob)) + blob)
        out.flush()


if __name__ == "__main__":
    main()
