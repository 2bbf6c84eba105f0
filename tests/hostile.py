"""What must never leave a run's folder: files that lie there, and links that lead out of it."""

from pathlib import Path

SECRET = "hf_" + "s" * 34  # in every file here

FILES = [
    # secrets, and what other programs keep in hidden files
    ".env", ".netrc", ".lock", ".git/config", ".cache/huggingface/token", ".ipynb_checkpoints/README.md",
    ".config.json", ".model.safetensors", "id_rsa", "credentials.json", "secrets.yaml", "token",
    # another run, and copies, in the same folder
    "seed2/training_args.bin", "seed2/rollouts/step_000001.parquet", "seed2/config.json", "seed2/model.safetensors",
    "seed2/README.md", "seed2/checkpoint-10/optimizer.pt", "old/adapter_model.safetensors", "old/adapter_config.json",
    "additional_chat_templates/notes.txt", "additional_chat_templates/deep/tool.jinja",
    "config.json.bak", "config.json~", "README.md.orig", "MODEL.SAFETENSORS", "Config.JSON", "model.safetensors.part",
    ".part-model.safetensors", "_README.md.part", "model-1.safetensors", "model.safetensors.json", "xmodel.safetensors",
    "model.safetensors\n", "model-00001-of-00002.safetensors.tmp", "training_data.safetensors",
    # states of the training, with all its arguments
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts_0.pt",
    "held_out_before.json", "manifest.json", "all_results.json", "checkpoint-1/training_args.bin",
    "global_step1/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/.metadata", "latest", "zero_to_fp32.py",
    # logs
    "events.out.tfevents.1.host", "runs/Jan01/events.out.tfevents.1.host.2", "wandb/run-1/files/config.yaml",
    "wandb/debug.log", "mlruns/0/meta.yaml", "train.log", "nohup.out", "rollouts/step_000001.parquet",
    "rollouts/metrics.jsonl", "completions/completions_00001.parquet", "core.1234",
    # data and code of the user
    "train.jsonl", "held_out.csv", "my_rewards.py", "recipe.yaml", "notes.txt", "data/vocab.json", "photo.png",
    "pytorch_model.bin.old", "[a]*.json", "tokenizer.json\\..\\x", "key_tokens.html.part",
]  # fmt: skip
# Link -> what it points to, outside of the folder. Each name is one that would be sent if it were a file.
LINKS = {
    "model-00001-of-00001.safetensors": "private.safetensors",
    "generation_config.json": "private.json",
    "LICENSE": "id_rsa",
    "spiece.model": "private.safetensors",
    "additional_chat_templates/tool.jinja": "id_rsa",
    "special_tokens_map.json": "missing.json",
    "picture.png": "id_rsa",
}
FOLDER_LINKS = {"linked": "private_folder", "ref": "private_folder"}


def add(folder: Path, outside: Path, *, files=FILES, links=LINKS) -> int:
    """Put them into a folder; what is there already stays. Return how many there are, those behind links too."""
    outside.mkdir(parents=True)
    for name in ("private.safetensors", "private.json", "id_rsa", "private_folder/config.json", "private_folder/x.txt"):
        (outside / name).parent.mkdir(exist_ok=True)
        (outside / name).write_text(f"{SECRET} {name}")
    count = 0
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(f"{SECRET} {name}")
        count += 1
    for name, target in links.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / target)
        count += 1
    for name, target in FOLDER_LINKS.items():
        (folder / name).symlink_to(outside / target)
        count += 2
    return count
