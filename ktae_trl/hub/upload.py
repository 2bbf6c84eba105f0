"""A run's folder on the Hub: the card, the key-token page beside it, and an upload that can be tried again.

ktae push FOLDER [--repo_id USER/NAME] [--private true|false]
    [--results RESULTS ...] [--revision BRANCH] [--include FILE ...]

RESULTS are folders of eval.py, or their summary.json. FILE is a path in FOLDER of what is no part of the model and is
to be uploaded too. No GPU is needed, and no model is loaded.
"""

import argparse
import glob
import logging
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ktae_trl.arguments import NotFoundError, UserError, user_errors
from ktae_trl.files import model_files
from ktae_trl.files.model_files import CARD, PAGE, RefusedFileError
from ktae_trl.files.writing import replacing
from ktae_trl.hub import card as model_card
from ktae_trl.hub import results as measured
from ktae_trl.report import records

TIMEOUT = 120.0  # seconds without a sign of life; the client's own default is to wait for ever
# What the client and its libraries raise. HTTPError is that of httpx, with huggingface_hub 2 that of httpx2.
_FAILURES = (OSError, RuntimeError, ValueError, HTTPError)
logger = logging.getLogger(__name__)


class HubError(UserError, OSError):
    """The Hub could not be reached or refused; the message says what to do."""


class Api(HfApi):
    """huggingface_hub's client; of a folder it uploads what `model_files` chooses, and does not wait for ever."""

    def upload_folder(
        self, *, folder_path, path_in_repo=None, include=(), ignore_patterns=None, run_as_future=False, **kwargs
    ) -> CommitInfo | Future:
        """Upload what makes the model in a folder or, with `path_in_repo`, what makes the checkpoint there."""
        kwargs |= {"folder_path": folder_path, "path_in_repo": path_in_repo}
        if run_as_future:
            return self.run_as_future(_or_warn, self.upload_folder, include=include, **kwargs)
        folder = Path(folder_path)
        chosen = model_files.of_checkpoint(folder) if path_in_repo else model_files.of_model(folder, include)
        _do_not_wait_for_ever()
        return super().upload_folder(allow_patterns=[glob.escape(name) for name in chosen.sent], **kwargs)


@cache
def api() -> Api:
    return Api(library_name="ktae_trl")  # one: its background uploads come one after the other


def _do_not_wait_for_ever() -> None:
    """Set a limit for the session that all clients share, unless who made it has set one."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = TIMEOUT


def _or_warn(upload: Callable[..., CommitInfo], *arguments, **kwargs) -> CommitInfo:
    """Upload; what fails is a warning too, for nobody may look at the future of an upload in the background."""
    try:
        return upload(*arguments, **kwargs)
    except Exception as error:
        logger.warning(
            "An upload to the Hub in the background failed: %s. Nothing is lost on disk, and the next one has it all.",
            error if isinstance(error, HubError) else reason_of(error),
        )
        raise


def repo_name(args) -> str:
    """Return the name that training arguments give a repository: `hub_model_id`, or their folder's."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def create_repo(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create a model's repository unless it is there, and return its whole id.

    Args:
        name: USER/NAME, or NAME for one's own.
        private: None leaves it to the account's or the organisation's default.

    Raises:
        HubError: the Hub refuses or is not reached, or the repository is there and public though `private` is set.
    """
    _do_not_wait_for_ever()
    try:
        repo_id = api().create_repo(name, token=token, private=private, exist_ok=True).repo_id
        public = private and api().model_info(repo_id, token=token).private is False
    except _FAILURES as error:
        raise HubError(f"The repository {name} could not be made on the Hub: {reason_of(error)}") from error
    if public:
        raise HubError(
            f"{repo_id} is on the Hub already and public, though a private repository was asked for. Make it private "
            "in its settings there, or choose another name"
        )
    return repo_id


def send(
    folder: Path,
    name: str,
    private: bool | None = None,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    wait: bool = True,
    include: Sequence[str] = (),
) -> CommitInfo | Future:
    """Upload the model in a run's folder, and what `include` names, to a repository of that name.

    `model_files` has what belongs to a model; what is left out is listed in a warning. Files that are there already are
    not sent again. Without `wait` it is done in the background.

    Raises:
        HubError: with the command that tries again.
    """
    if not wait:
        return api().run_as_future(
            _or_warn, send, folder, name, private, token=token, revision=revision, message=message, include=include
        )
    try:
        left_out = model_files.of_model(folder, include).left_out
        repo_id = create_repo(name, private=private, token=token)
        model_card.update(folder, repo_id=repo_id)
        done = api().upload_folder(
            repo_id=repo_id, folder_path=folder, include=include, commit_message=message, token=token, revision=revision
        )
    except _FAILURES as error:
        reason = error if isinstance(error, HubError) else reason_of(error)
        raise HubError(
            f"The upload to {name} failed: {reason}. Nothing is lost: the model is in {folder}. Try again: "
            + upload_command(folder, name, private, revision, include)
        ) from error
    if left_out:
        logger.warning(
            "Not uploaded from %s, because it is no part of the model: %s. ktae push --include adds files",
            folder,
            model_files.in_words(left_out),
        )
    return done


def upload_command(
    folder: Path, repo_id: str, private: bool | None, revision: str | None, include: Sequence[str] = ()
) -> str:
    """Return the command that uploads a run's folder."""
    words = ["ktae", "push", str(folder), "--repo_id", repo_id]
    words += [] if private is None else ["--private", str(private).lower()]
    words += [] if revision is None else ["--revision", revision]
    words += ["--include", *include] if include else []
    return shlex.join(words)


def reason_of(error: BaseException) -> str:
    """Return in a line why the Hub could not be asked."""
    chain = [error]
    while (error := error.__cause__ or error.__context__) is not None and error not in chain:
        chain.append(error)
    for error in chain:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # whichever library they are of
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            return "it knows no valid token (401). Log in with `hf auth login`, or set HF_TOKEN"
        if status == 403:
            said = error.server_message or "forbidden"
            return f"the token may not write there (403: {said}). Take one with write access"
        if isinstance(error, RefusedFileError):
            return str(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the Hub is not asked"
        if "TimeoutException" in kinds:
            return f"no answer within {get_session().timeout.read:g} seconds"
        if "TransportError" in kinds:
            return f"the connection broke ({type(error).__name__}: {error})"
    said = [" ".join(str(error).split()).rstrip(".") for error in chain[:2]]
    return f"{type(chain[0]).__name__}: " + "; ".join(text for text in said if text)


def write_page(folder: Path) -> None:
    """Write the key-token page if the run has records. One that cannot be made is a warning."""
    if (folder / records.FOLDER).is_symlink() or not records.files(folder):
        return  # behind a link are those of another run
    try:
        from ktae_trl.report import write_report  # heavy, and for this only

        with replacing(folder / PAGE) as draft:
            write_report(folder, draft)
    except Exception as error:  # a page is not worth a model
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.warning("The key-token page of %s could not be made: %s", folder, reason)


def publish(
    folder: Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    results: list[Path] = (),
    revision: str | None = None,
    include: Sequence[str] = (),
) -> CommitInfo:
    """Complete a run's folder (page, card) and upload it.

    Args:
        include: paths in the folder of files that are no part of the model and are to be uploaded too.

    Raises:
        UserError: the folder holds no model, the results are not of it, or a file of `include` cannot be sent.
        HubError: the Hub refuses or is not reached; what was added stays on disk.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise NotFoundError(f"{folder} holds no model: neither config.json nor adapter_config.json is there")
    sent = model_files.of_model(folder, include).sent
    if not any(name.endswith((".safetensors", ".bin")) for name in sent):
        raise NotFoundError(_no_weights(folder))
    found = [result for path in results for result in measured.of_evaluation(path, folder)]
    if not (folder / CARD).exists() or (folder / CARD).is_symlink():
        without = f"{folder} holds no {CARD}, or a link, which is not followed"
        if found:
            raise NotFoundError(f"{without}: there is nothing that the results could go into")
        logger.warning("%s: the model will have no card", without)
    if not (folder / PAGE).exists():
        write_page(folder)
    model_card.update(folder, repo_id=repo_id, results=found)
    return send(folder, repo_id or folder.absolute().name, private, revision=revision, include=include)


def _no_weights(folder: Path) -> str:
    if links := [path.name for path in folder.glob("*.safetensors") if path.is_symlink()]:
        return f"The weights in {folder} are a link ({links[0]}), and links are not followed. Copy the file there"
    if pickles := [path.name for path in folder.glob("*.bin") if path.name != model_files.ARGUMENTS]:
        return (
            f"{folder} holds no *.safetensors. {pickles[0]} is a pickle, which runs code when it is loaded. Load and "
            f"save the model (from_pretrained, save_pretrained), or add --include {pickles[0]}"
        )
    return (
        f"{folder} holds no weights (*.safetensors). Of a checkpoint in shards, make a model first: ktae merge "
        f"{folder} -o FOLDER"
    )


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="ktae push", description="Upload a run's folder to the Hub.")
    parser.add_argument("folder", type=Path, help="what train.py or trainer.push_to_hub() left")
    parser.add_argument("--repo_id", help="USER/NAME; default: the folder's name, in your own account")
    parser.add_argument(
        "--private",
        type=str.lower,
        choices=["true", "false"],
        help="for a new repository; default: what your account or organisation has set",
    )
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="folders of eval.py, for the model card")
    parser.add_argument("--revision", help="branch, which must be there; default: main")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="FILE", help="paths in the folder of other files to upload"
    )
    options = vars(parser.parse_args(words))
    options["private"] = {"true": True, "false": False}.get(options["private"])
    with user_errors("ktae push"):
        done = publish(**options)
    print(f"Uploaded {options['folder']}: {done.repo_url}")
