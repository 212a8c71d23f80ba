"""The program, as `marlin-convert` and as `python -m marlin_convert`.

What it imports takes a while: a signal that comes meanwhile ends it in the same way as later ones. Until Python has
come to this file, signals have Python's own action.
"""

# What `signal` is made of, inside Python: to import that takes longer than all else here.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys


def _end(number: int, frame: object) -> None:
    text = "interrupted; nothing half-done was left behind."
    code = 128 + number
    if "--json" in sys.argv:
        document = (
            '{"schema_version": 1, "ok": false, "source": null, "error": "Interrupted", '
            f'"message": "{text}", "exit_code": {code}}}\n'
        )
        os.write(1, document.encode())
    else:
        os.write(2, f"\nmarlin-convert: {text}\n".encode())
    os._exit(code)


for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) != signal.SIG_IGN:
        signal.signal(_number, _end)


def program() -> None:
    """Run the command line on the arguments of this process."""
    from .cli import main

    main()


if __name__ == "__main__":
    program()
