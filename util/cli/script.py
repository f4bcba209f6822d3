"""How a main starts and ends: the command line is answered before torch is imported, mistakes end in one line."""

import functools
import importlib.util
import os
import re
import signal
import sys

from util.errors import ParameterError, UserError
from util.files import printable


def check_command_line(get_options) -> None:
    """Answer --help and whatever the command line alone shows to be wrong. The mains call it before they import torch.

    get_options() -> Options, checked; main() calls it again: between the two, nothing is kept. Until run_main begins, a
    package that is not installed and an interrupt end the script in one line as well.
    """
    try:
        options = get_options()
        data = getattr(options, "data", None)  # a sweep has none of its own
        if data and data.dataset == "folder" and data.data_path and not os.path.isdir(data.data_path):
            raise UserError(f"--data_path {data.data_path}: no such folder")
    except UserError as error:
        print_error(error)
        sys.exit(2)
    sys.excepthook = _failed_import


def _failed_import(kind, error, trace) -> None:
    if isinstance(error, KeyboardInterrupt):
        print_error(KeyboardInterrupt("interrupted while starting"))
        os._exit(130)
    if isinstance(error, ModuleNotFoundError) and (missing := missing_package(error)):
        print_error(missing)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


# What `import` calls a package of requirements.txt where pip calls it otherwise.
PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """One line that names the package of requirements.txt that is not installed; None for a module of our own."""
    name = (error.name or "").partition(".")[0]
    if name and importlib.util.find_spec(name) is not None:
        return None  # part of an installed package
    if not name:
        return UserError(str(error))  # torchmetrics tells in its own words what it lacks
    name = PIP_NAMES.get(name, name)
    return UserError(f"the package {name} is not installed; `pip install {name}`, or all of requirements.txt")


def require_package(name: str, flag: str) -> None:
    """UserError unless the package that one mode needs is there: before any work is done."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{flag}: needs the package {name}; `pip install {name}`, or all of requirements.txt")


def print_error(error: BaseException) -> None:
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


# Flags of networks' keywords that are called otherwise.
FLAG_OF = {
    "img_size": "--input_size",
    "num_classes": "--nb_classes",
    "partial": "--partial_load",
    "sampler": "--vis_type",
}


def says_flags(main):
    """A main whose errors name flags where the networks' name keywords."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except ParameterError as error:
            raise error.by_flags(FLAG_OF) from None

    return wrapped


def run_main(main) -> None:
    """Call a script's main(); the user's mistakes end in one line and exit code 2, an interrupt in 130."""
    from util.dist import shutdown
    from util.files import TolerantStream
    from util.folder import remove_empty_folders

    for stream in (sys.stdout, sys.stderr):  # a name that the terminal has no letters for must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    sys.excepthook = sys.__excepthook__
    try:
        code = main()
    except (UserError, RuntimeError, ModuleNotFoundError) as error:
        mended = error if isinstance(error, UserError) else known_failure(error)
        if mended is None:
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again while all is torn down
        print_error(mended)
        code = 2
        remove_empty_folders()
    except KeyboardInterrupt:
        code = 130
        remove_empty_folders()
    if code == 2 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(2)  # other ranks may wait in a collective that this one left: no orderly goodbye
    shutdown()
    sys.exit(code)


def known_failure(error: RuntimeError | ModuleNotFoundError) -> UserError | None:
    """What the user can do about a failure that torch reports where it happens to notice it; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    from util.data.loader import file_of_process
    from util.dist import lost_rank

    if lost := lost_rank(error):
        return lost
    text = " ".join(str(error).split())
    if "does not have a deterministic implementation" in text:
        return UserError(f"--deterministic: {text[:120]}; leave the flag out, or use another device")
    if (
        "DataLoader worker (pid" in text
    ):  # one that died; what one raised is told as "Caught ... in DataLoader worker process"
        pid = re.search(r"DataLoader worker \(pid\D*(\d+)", text)
        path = file_of_process(int(pid.group(1))) if pid else None
        at = f" at {printable(path)}" if path else ""
        return UserError(
            f"--num_workers: a loader process died{at} ({text[:160]}); was it killed for want of memory? Run the line "
            "again (training goes on from its last checkpoint by --resume auto), with fewer --num_workers if it "
            "happens again"
        )
    return None
