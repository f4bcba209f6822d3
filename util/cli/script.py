"""Start and end of a main: the command line is checked before torch is imported, mistakes end in one line."""

import functools
import importlib.util
import os
import re
import signal
import sys

from util.errors import ParameterError, UserError
from util.files import printable


def check_command_line(get_options) -> None:
    """Answer --help and report mistakes in the command line. Mains call it before they import torch.

    get_options() -> checked Options; main() calls it again. Until run_main begins, a missing package or an interrupt
    also ends the script in one line.
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


# Import names of packages in requirements.txt that pip names differently.
PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The error to report if a package of requirements.txt is not installed; None for a module of this project."""
    name = (error.name or "").partition(".")[0]
    if name and importlib.util.find_spec(name) is not None:
        return None  # part of an installed package
    if not name:
        return UserError(str(error))  # torchmetrics' own text
    name = PIP_NAMES.get(name, name)
    return UserError(f"the package {name} is not installed; `pip install {name}`, or all of requirements.txt")


def require_package(name: str, flag: str) -> None:
    """UserError if a package that only one mode needs is missing, before any work is done."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # None: a folder of that name, such as W&B's own of earlier runs
        pip = PIP_NAMES.get(name, name)
        raise UserError(f"{flag}: needs the package {name}; `pip install {pip}`, or all of requirements.txt")


def print_error(error: BaseException) -> None:
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


# Keywords of networks whose flags have other names.
FLAG_OF = {
    "img_size": "--input_size",
    "num_classes": "--nb_classes",
    "partial": "--partial_load",
    "sampler": "--vis_type",
}


def says_flags(main):
    """Decorator for a main: errors about a network's keywords name the flags instead."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except ParameterError as error:
            raise error.by_flags(FLAG_OF) from None

    return wrapped


def run_main(main) -> None:
    """Call a script's main(). Mistakes of the user end in one line and exit code 2, an interrupt in 130."""
    from util.dist import shutdown
    from util.files import TolerantStream
    from util.folder import remove_empty_folders

    for stream in (sys.stdout, sys.stderr):  # print names that the terminal cannot encode
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
    sys.excepthook = sys.__excepthook__
    try:
        code = main()
    except (UserError, RuntimeError, ModuleNotFoundError) as error:
        reported = error if isinstance(error, UserError) else known_failure(error)
        if reported is None:
            raise
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again during shutdown
        print_error(reported)
        code = 2
        remove_empty_folders()
    except KeyboardInterrupt:
        code = 130
        remove_empty_folders()
    if code == 2 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(2)  # an orderly shutdown would wait for other ranks in a collective
    shutdown()
    sys.exit(code)


def known_failure(error: RuntimeError | ModuleNotFoundError) -> UserError | None:
    """The error to report for a failure inside torch that the user can act on; None for any other."""
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
    ):  # it died; an exception in a worker reads "Caught ... in DataLoader worker process"
        pid = re.search(r"DataLoader worker \(pid\D*(\d+)", text)
        path = file_of_process(int(pid.group(1))) if pid else None
        at = f" at {printable(path)}" if path else ""
        return UserError(
            f"--num_workers: a loader process died{at} ({text[:160]}); was it out of memory? Run the command "
            "again (training continues from the last checkpoint with --resume auto), with fewer --num_workers if it "
            "happens again"
        )
    return None
