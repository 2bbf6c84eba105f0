"""Uploads a run's folder to the Hub, with its card and key-token page. A failed upload can be repeated.

ktae push FOLDER [--repo_id USER/NAME] [--private true|false]
    [--results RESULTS ...] [--revision BRANCH] [--include FILE ...]

RESULTS are output folders of eval.py or their summary.json. FILE is an additional file to upload that is not part of
the model, as a path relative to FOLDER. The command needs no GPU and loads no model.
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

TIMEOUT = 120.0  # seconds without a response; by default the client waits forever
# Errors of the client and its libraries. HTTPError is from httpx; from httpx2 with huggingface_hub 2.
_FAILURES = (OSError, RuntimeError, ValueError, HTTPError)
logger = logging.getLogger(__name__)


class HubError(UserError, OSError):
    """The Hub could not be reached or rejected a request. The message contains the remedy."""


class Api(HfApi):
    """huggingface_hub's client with a timeout. From a folder it uploads only what `model_files` chooses."""

    def upload_folder(
        self, *, folder_path, path_in_repo=None, include=(), ignore_patterns=None, run_as_future=False, **kwargs
    ) -> CommitInfo | Future:
        """Upload the files of the model in a folder or, with `path_in_repo`, those of the checkpoint."""
        kwargs |= {"folder_path": folder_path, "path_in_repo": path_in_repo}
        if run_as_future:
            return self.run_as_future(_or_warn, self.upload_folder, include=include, **kwargs)
        folder = Path(folder_path)
        chosen = model_files.of_checkpoint(folder) if path_in_repo else model_files.of_model(folder, include)
        _do_not_wait_for_ever()
        return super().upload_folder(allow_patterns=[glob.escape(name) for name in chosen.sent], **kwargs)


@cache
def api() -> Api:
    return Api(library_name="ktae_trl")  # a single client runs background uploads one after the other


def _do_not_wait_for_ever() -> None:
    """Set the timeout of the session that all clients share, unless it already has one."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = TIMEOUT


def _or_warn(upload: Callable[..., CommitInfo], *arguments, **kwargs) -> CommitInfo:
    """Upload, and log a failure as a warning, since the future of a background upload may never be read."""
    try:
        return upload(*arguments, **kwargs)
    except Exception as error:
        logger.warning(
            "A background upload to the Hub failed: %s. All files are on disk, and the next upload includes them.",
            error if isinstance(error, HubError) else reason_of(error),
        )
        raise


def repo_name(args) -> str:
    """Return the repository name of a training: `hub_model_id`, or the name of `output_dir`."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def create_repo(name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Create a model repository if it does not exist, and return its full id.

    Args:
        name: USER/NAME, or NAME for the user's own account.
        private: None uses the default of the account or organisation.

    Raises:
        HubError: the Hub cannot be reached or rejects the request, or the repository exists and is public although
            `private` is set.
    """
    _do_not_wait_for_ever()
    try:
        repo_id = api().create_repo(name, token=token, private=private, exist_ok=True).repo_id
        public = private and api().model_info(repo_id, token=token).private is False
    except _FAILURES as error:
        raise HubError(f"Could not create the repository {name} on the Hub: {reason_of(error)}") from error
    if public:
        raise HubError(
            f"{repo_id} already exists on the Hub and is public, but a private repository was requested. Make it "
            "private in its settings on the Hub, or choose another name"
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
    """Upload the model in a run's folder, and the files in `include`, to the repository `name`.

    `model_files` defines which files belong to a model. A warning lists the other files. Files that are already in the
    repository are not sent again. With `wait=False` the upload runs in the background.

    Raises:
        HubError: the upload failed. The message contains the command to try again.
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
            "Files in %s that are not part of the model were not uploaded: %s. To add files, use ktae push --include",
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
    """Return on one line why a request to the Hub failed."""
    chain = [error]
    while (error := error.__cause__ or error.__context__) is not None and error not in chain:
        chain.append(error)
    for error in chain:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, since the library differs between versions
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401 or isinstance(error, LocalTokenNotFoundError):
            return "the token is missing or was rejected (401). Log in with `hf auth login`, or set HF_TOKEN"
        if status == 403:
            said = error.server_message or "forbidden"
            return f"the token has no write access (403: {said}). Use a token with write access"
        if isinstance(error, RefusedFileError):
            return str(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set. Unset it to use the Hub"
        if "TimeoutException" in kinds:
            return f"no response within {get_session().timeout.read:g} seconds"
        if "TransportError" in kinds:
            return f"the connection failed ({type(error).__name__}: {error})"
    said = [" ".join(str(error).split()).rstrip(".") for error in chain[:2]]
    return f"{type(chain[0]).__name__}: " + "; ".join(text for text in said if text)


def write_page(folder: Path) -> None:
    """Write the key-token page if the run has records. A failure is only a warning."""
    if (folder / records.FOLDER).is_symlink() or not records.files(folder):
        return  # a link may lead to the records of another run
    try:
        from ktae_trl.report import write_report  # slow to import, and needed only here

        with replacing(folder / PAGE) as draft:
            write_report(folder, draft)
    except Exception as error:  # must not prevent the upload of the model
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.warning("Could not write the key-token page of %s: %s", folder, reason)


def publish(
    folder: Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    results: list[Path] = (),
    revision: str | None = None,
    include: Sequence[str] = (),
) -> CommitInfo:
    """Add the key-token page and the results to a run's folder, and upload it.

    Args:
        results: output folders of eval.py, or their `summary.json`.
        include: additional files to upload that are not part of the model, as paths relative to the folder.

    Raises:
        UserError: the folder contains no model, the results belong to another model, or a file of `include` must not be
            uploaded.
        HubError: the upload failed. The page and the updated card stay on disk.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise NotFoundError(f"{folder} contains no model: it has neither config.json nor adapter_config.json")
    sent = model_files.of_model(folder, include).sent
    if not any(name.endswith((".safetensors", ".bin")) for name in sent):
        raise NotFoundError(_no_weights(folder))
    found = [result for path in results for result in measured.of_evaluation(path, folder)]
    if not (folder / CARD).exists() or (folder / CARD).is_symlink():
        without = f"{folder} has no {CARD} (links are not followed)"
        if found:
            raise NotFoundError(f"{without}, so there is no card to add the results to")
        logger.warning("%s, so the model is uploaded without a card", without)
    if not (folder / PAGE).exists():
        write_page(folder)
    model_card.update(folder, repo_id=repo_id, results=found)
    return send(folder, repo_id or folder.absolute().name, private, revision=revision, include=include)


def _no_weights(folder: Path) -> str:
    if links := [path.name for path in folder.glob("*.safetensors") if path.is_symlink()]:
        return f"The weights in {folder} are a symbolic link ({links[0]}), which is not followed. Copy the file there"
    if pickles := [path.name for path in folder.glob("*.bin") if path.name != model_files.ARGUMENTS]:
        return (
            f"{folder} contains no *.safetensors. {pickles[0]} is a pickle, which can run code when it is loaded. "
            f"Convert it (from_pretrained, then save_pretrained), or add --include {pickles[0]}"
        )
    return (
        f"{folder} contains no weights (*.safetensors). If it is a sharded checkpoint, merge it first: ktae merge "
        f"{folder} -o FOLDER"
    )


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="ktae push", description="Upload a run's folder to the Hub.")
    parser.add_argument("folder", type=Path, help="output folder of a training run")
    parser.add_argument("--repo_id", help="USER/NAME; default: the folder's name in your own account")
    parser.add_argument(
        "--private",
        type=str.lower,
        choices=["true", "false"],
        help="whether a new repository is private; default: the setting of your account or organisation",
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], help="output folders of ktae eval, to add to the model card"
    )
    parser.add_argument("--revision", help="existing branch; default: main")
    parser.add_argument("--include", nargs="+", default=[], metavar="FILE", help="other files in the folder to upload")
    options = vars(parser.parse_args(words))
    options["private"] = {"true": True, "false": False}.get(options["private"])
    with user_errors("ktae push"):
        done = publish(**options)
    print(f"Uploaded {options['folder']}: {done.repo_url}")
