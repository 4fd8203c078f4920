"""The shell around every command: errors become two lines on stderr and an exit code; signals; the end of the process."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from lorafit.distributed import connect, is_first, only_train, outlast_first
from lorafit.errors import DONE, FAILED, INTERRUPTED, TERMINATED, LorafitError, OneProcess, RequestError
from lorafit.operations import ours
from lorafit.outputs import last_run
from lorafit.settings import OPTIONS

# Typer may carry its own copy of click: its errors are found by their place in the family.
_CLICK_ERROR: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
debug = False  # --debug: errors show where they came from


class Boundary(TyperGroup):
    """A group of commands that reports every error in one or two lines."""

    def main(  # type: ignore[override]  # the other parameters go on as they come
        self, args: Any = None, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        signal.signal(signal.SIGTERM, _on_term)
        code: Any = DONE
        try:
            connect()
            only_train(args)
            code = super().main(args, standalone_mode=False, **extra)
            if code == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
                raise KeyboardInterrupt
        except LorafitError as error:
            code = _report(error)
        except _CLICK_ERROR as error:
            wrong = _usage(error, list(sys.argv[1:] if args is None else args))
            code = _report(wrong) if wrong.message else wrong.exit_code  # a bare `lorafit` has shown its help
        except (KeyboardInterrupt, typer.Abort):
            code = _report(LorafitError("interrupted"), INTERRUPTED)
        except Terminated:
            code = _report(LorafitError("terminated"), TERMINATED)
        except BrokenPipeError:  # the reader has closed the pipe: `lorafit inspect … | head`
            _drop_output()
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # `lorafit inspect > /dev/full`
                _drop_output()
                code = _report(LorafitError("cannot write the output: no space left on the device"), FAILED)
                sys.exit(code)
            if isinstance(error, RuntimeError) and "home directory" in str(
                error
            ):  # pathlib, of `~nobody/model`
                named = next((word for word in args or sys.argv[1:] if "~" in word), "~")
                sys.exit(
                    _report(
                        RequestError(
                            f"`{named}`: there is no such user, or no home folder", "name the whole path"
                        )
                    )
                )
            if debug:
                raise
            text = str(error).strip().splitlines()
            what = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
            hint = "--debug shows the traceback; please report it with the command"
            code = _report(Unexpected(f"unexpected error: {what}", hint))
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else DONE)
        return code


def _drop_output() -> None:
    """Send what is still in stdout's buffer nowhere, so that the last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Unexpected(LorafitError):
    """An error that is a bug of lorafit's, or of a library."""


class Terminated(BaseException):
    """SIGTERM, as an exception."""


def _on_term(number: int, frame: Any) -> None:
    raise Terminated


def _report(error: LorafitError, code: int | None = None) -> int:
    """Show an error; the exit code. Of several processes the first shows an error of all, and another what only
    it can know, or what was not expected."""
    code = error.exit_code if code is None else code
    if not is_first() and not isinstance(error, (OneProcess, Unexpected)):
        if code not in (INTERRUPTED, TERMINATED):
            outlast_first()
        return code
    if debug:
        import traceback

        traceback.print_exception(error)
    from lorafit.screen import Screen

    Screen().error(error)
    return code


def _usage(error: Any, arguments: list[str]) -> LorafitError:
    """An error of the command line, without the parser's own layout."""
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = "lorafit " + next((word for word in arguments if not word.startswith("-")), "")
    if context is not None:
        command = f"lorafit {context.info_name}" if context.parent is not None else "lorafit"
    # an option that is not there; one without its value has a name, and no possibilities
    name = getattr(error, "option_name", "") if hasattr(error, "possibilities") else ""
    known = (
        [flag for parameter in context.command.params for flag in parameter.opts] if name and context else []
    )
    if name and (hint := ours(name, known)):
        return RequestError(f"there is no option `{name}`", hint)
    if known and name in {option.flag for option in OPTIONS.values()} and not {name, f"{name}s"} & {*known}:
        return RequestError(
            f"`{name}` is an option of `lorafit train`, not of `{command}`", "leave it out here"
        )
    if name and getattr(error, "possibilities", None):
        return RequestError(f"there is no option `{name}`", f"did you mean {error.possibilities[0]}?")
    if (extra := re.search(r"unexpected extra arguments? ?(?:\(s\))? ?\((.*)\)", message)) is not None:
        return _too_many(command, extra[1], arguments, context)
    if (wrong := _bad_number(getattr(error, "param", None), arguments)) is not None:
        return wrong
    offer = (
        f"the last run: {command} {shlex.quote(last)}; "
        if "ADAPTER" in message and (last := last_run())
        else ""
    )
    return RequestError(message[:1].lower() + message[1:], f"{offer}see `{command.strip()} --help`")


def _bad_number(parameter: Any, arguments: list[str]) -> LorafitError | None:
    """An option that takes a number and was given something else; None for other options."""
    bare = getattr(parameter, "bare_type", None)  # where typer has its own parser; click's types have names
    kind = bare() if callable(bare) else getattr(getattr(parameter, "type", None), "name", "")
    number = next((word for word in ("int", "float") if word in str(kind)), "")
    flag = next((name for name in getattr(parameter, "opts", ()) if name in arguments), "")
    if not number or not flag or flag == arguments[-1]:
        return None
    low, high = (
        getattr(parameter, end, None) if hasattr(parameter, end) else getattr(parameter.type, end, None)
        for end in ("min", "max")
    )
    takes = "a whole number" if number == "int" else "a number"
    takes += f" from {low:g} on" if low is not None else ""
    takes += f", at most {high:g}" if high is not None and high < 1e6 else ""
    given = [value for word, value in pairwise(arguments) if word == flag]
    wrong = next((value for value in given if not _within(value, number, low, high)), given[0])
    return RequestError(f"{flag} is `{wrong}`: it takes {takes}")


def _within(text: str, kind: str, low: float | None, high: float | None) -> bool:
    """Whether a text is a number of that kind within the bounds."""
    try:
        value = int(text) if kind == "int" else float(text)
    except ValueError:
        return False
    return (low is None or value >= low) and (high is None or value <= high)


YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _too_many(command: str, extra: str, arguments: list[str], context: Any) -> LorafitError:
    """An argument too many, and what it was probably meant as."""
    words = [word for word in arguments if extra == word or extra.startswith(f"{word} ")]
    first = max(words, key=len, default=extra.split()[0])
    switches = {option.flag: option for option in OPTIONS.values() if isinstance(option.default, bool)}
    followed = (last for last, word in pairwise(arguments) if word == first)
    switch = next((last for last in followed if last in switches), "")
    if switch and first.lower() in (*YES, *NO):
        off = f"write --no-{switch[2:]}" if switches[switch].training else f"leave out {switch}"
        hint = off if first.lower() in NO else f"write {switch} alone"
        return RequestError(f"{switch} takes no value, and `{first}` follows it", hint)
    valued = {
        flag for each in context.command.params if not getattr(each, "is_flag", False) for flag in each.opts
    }
    before = next(
        (
            word
            for last, word in pairwise(arguments)
            if not word.startswith("-") and last not in valued and word != first
        ),
        "RUN",
    )
    hint = f"see `{command} --help`"
    if command == "lorafit merge":
        hint = shlex.join([*command.split(), before, "--adapter", first, "-o", "DIR"])
    elif command in ("lorafit train", "lorafit plan", "lorafit data"):
        hint = f"was it meant as --data {shlex.quote(first)}?"
    return RequestError(f"`{first}` is one argument too many for `{command}`", hint)


@contextmanager
def stopping(repeated: bool = False) -> Iterator[Callable[[], int]]:
    """The first Ctrl-C or SIGTERM ends a run after its step, the second one at once. Where a signal is
    `repeated`, as a launcher does before it kills after 30 s, later ones do nothing.

    Yields a function that returns the signal's number, or 0.
    """
    received = 0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal received
        if received and not repeated:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        received = number

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_to_the_end(app: typer.Typer) -> NoReturn:
    """Run the command line and end the process.

    Without the interpreter's shutdown, which takes a second once torch is loaded.
    """
    from lorafit.screen import allow_ascii

    code: Any = DONE
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):  # closed by the caller, `>&-`: Python has None there
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        allow_ascii(getattr(sys, name))
    try:
        app()
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader has closed the pipe: `lorafit presets | true`
        pass
    except OSError:  # the last lines could not be written, e.g. to a full disk
        code = code or FAILED
    os._exit(code if isinstance(code, int) else DONE)
