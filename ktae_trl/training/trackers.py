"""Send the key tokens of a group to the trackers: to TensorBoard as a table, to trackio and wandb in colour."""

import logging

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from ktae_trl.report import KeyTokens, markdown
from ktae_trl.report.group_view import clip, statistics
from ktae_trl.report.records import Record
from ktae_trl.report.tokens import label

NAME = "key_tokens"
_ROWS, _CHARACTERS = 30, 40  # at most: rows of the table, characters of a token in it
logger = logging.getLogger(__name__)


def send_sample(record: Record, step: int, handler: CallbackHandler) -> None:
    """Send a group to the trackers of a trainer. If one of them fails, a warning is logged and training continues."""
    for callback in handler.callbacks:
        send = next((send for kind, send in _SENDERS.items() if isinstance(callback, kind)), None)
        if send is None:
            continue
        try:
            send(callback, record, step)
        except Exception as error:  # whatever a tracker, or its network, raises
            logger.warning("%s did not accept the key tokens of step %d: %s", type(callback).__name__, step, error)


def table(record: Record) -> str:
    """Return the tokens of a group with the largest |K| as a Markdown table."""
    found = statistics(record.method, record.rows)
    text = {i: token for row in record.rows for i, token in zip(row["token_ids"], row["tokens"], strict=True)}
    most = sorted(found.tokens.items(), key=lambda item: -abs(item[1][-1]))[:_ROWS]
    rows = [
        (
            markdown.code(clip(label(text[i]), _CHARACTERS)),
            f"{a} of {found.right}",
            f"{b} of {found.wrong}",
            f"{p:.3g}",
            f"{K:+.2f}",
        )
        for i, (a, b, p, *_, K) in most
    ]
    return markdown.table(("token", "in correct", "in wrong", "p", "K"), rows)


def _tensorboard(callback, record, step) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(NAME, table(record), step)


def _wandb(callback, record, step) -> None:
    import wandb

    if wandb.run is not None:
        html = wandb.Html(KeyTokens(record)._repr_html_(), inject=False, data_is_not_path=True)
        wandb.log({NAME: html, "train/global_step": step})


def _trackio(callback, record, step) -> None:
    import trackio

    trackio.log({NAME: trackio.Html(KeyTokens(record)._repr_html_()), "train/global_step": step})


_SENDERS = {TensorBoardCallback: _tensorboard, WandbCallback: _wandb, TrackioCallback: _trackio}
