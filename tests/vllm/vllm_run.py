"""One process of a training with vLLM, for `test_vllm_training.py`: vllm_run.py SETTINGS.json FOLDER.

The settings are those of `make_trainer`, any field of KTAEGRPOConfig among them; `lora` adds an adapter, `prompts` is
the number of problems. Writes, per process, how far vLLM's log-probabilities are from the model's, at each generation
and with weights that vLLM does not have yet; the credit, the metrics and the weights.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from tests.trainers import around, difference, make_trainer, prompts, weights


def patch(mode: str) -> None:
    """Let vLLM compute as the model in training does, and let TRL use it on a CPU. For tests only."""
    # float32 like the model in training: then what is left of a gap is a fault, not rounding.
    # Small blocks, as on a GPU: the CPU build's own of 128 tokens are never full here, so nothing would be cached.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32", block_size=32)
    if torch.cuda.is_available():
        return
    import vllm.model_executor.layers.utils as layers

    # The CPU build packs a layer's weight into its own layout and frees it, so that no new weight can be loaded.
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )
    if mode == "server":  # a server gets its weights over NCCL, which needs a GPU
        VLLMClient.init_communicator = lambda self, device: None
        vllm_generation.VLLMGeneration.sync_weights = lambda self: None


def gaps(trainer, prompt_ids, completion_ids, logprobs) -> list[float]:
    """Return, per rollout, the mean absolute gap of vLLM's log-probabilities to the model's.

    One forward pass per rollout and no padding, so nothing of the trainer's own way to compute them.
    """
    result = []
    for prompt, completion, theirs in zip(prompt_ids, completion_ids, logprobs, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + completion], device=trainer.model.device)
            logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1].cpu()
        mine = logits.float().log_softmax(-1)[range(len(completion)), completion]
        result.append((mine - torch.tensor(theirs)).abs().mean().item())
    return result


def watch_cache(trainer) -> list[tuple[int, int, int]]:
    """Collect, per call of the engine, its requests, the tokens they begin with and how many of these were cached."""
    calls, generate = [], trainer.vllm_generation.llm.generate

    def spy(*arguments, **more):
        outputs = generate(*arguments, **more)
        known = sum(len(output.prompt_token_ids) for output in outputs)
        calls.append((len(outputs), known, sum(output.num_cached_tokens for output in outputs)))
        return outputs

    trainer.vllm_generation.llm.generate = spy
    return calls


def problems(trainer, n: int = 8) -> list[list[int]]:
    messages = list(prompts(n)["prompt"])
    return trainer.processing_class.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def gap_now(trainer) -> float:
    """Return the gap with the weights that vLLM has now."""
    ids = problems(trainer)
    _, completion_ids, logprobs, _ = trainer.vllm_generation.generate(ids, None, num_generations=1)
    return max(gaps(trainer, ids, completion_ids, [[token[0] for token in row] for row in logprobs]))


def ask_server(trainer) -> dict:
    """Generate from the server as TRL does, greedily and in groups of 4, and greedily with transformers."""
    client, ids = trainer.vllm_generation.vllm_client, problems(trainer)
    greedy = client.generate(ids, n=1, temperature=0, max_tokens=32)["completion_ids"]
    expected = []
    for prompt in ids:
        prompt = torch.tensor([prompt], device=trainer.model.device)
        mask = torch.ones_like(prompt)
        whole = trainer.model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=32)
        expected.append(whole[0, prompt.shape[1] :].tolist())
    sampled = client.generate(ids, n=4, max_tokens=32)
    rows = sampled["completion_ids"], [[token[0] for token in row] for row in sampled["logprobs"]]
    return {
        "greedy": greedy,
        "expected": expected,
        "prompts": sampled["prompt_ids"] == ids,
        "gaps": gaps(trainer, [prompt for prompt in ids for _ in range(4)], *rows),
        "gaps_of_wrong_prompts": gaps(trainer, [prompt for prompt in ids[1:] + ids[:1] for _ in range(4)], *rows),
    }


def main(settings: dict, folder: Path) -> None:
    patch(settings["vllm_mode"])
    if settings.pop("lora", False):
        settings["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(folder, train_dataset=prompts(settings.pop("prompts", 16)), use_vllm=True, **settings)
    result = {"rollouts": []}

    def spy(generate, inputs):
        batch = generate(inputs)
        unpadded = [
            [row[kept.bool()].tolist() for row, kept in zip(batch[name], batch[mask], strict=True)]
            for name, mask in (
                ("prompt_ids", "prompt_mask"),
                ("completion_ids", "completion_mask"),
                ("sampling_per_token_logps", "completion_mask"),
            )
        ]
        result["rollouts"].append(
            {
                "prompts": unpadded[0],
                "completions": unpadded[1],
                "gap": max(gaps(trainer, *unpadded)),
                "credit": batch["credit"].clone(),
                "trained": (batch["completion_mask"] * batch.get("tool_mask", 1)).clone(),
            }
        )
        return batch

    around(trainer, "batch", spy)
    if trainer.vllm_mode == "colocate":
        result["calls"] = watch_cache(trainer)
    elif trainer.accelerator.is_main_process:  # it alone knows the server
        result["server"] = ask_server(trainer)
    before = weights(trainer)
    trainer.train()
    accelerator = trainer.accelerator
    result["weights"] = weights(trainer)
    result["moved"] = difference(before, result["weights"])
    result["metrics"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    result["processes"] = accelerator.num_processes
    result["distributed_type"] = str(accelerator.distributed_type.value)

    if trainer.vllm_mode == "colocate":
        result["a_step_behind"] = gap_now(trainer)
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        result["stale"] = gap_now(trainer)
        trainer.vllm_generation.sync_weights()
        result["fresh"] = gap_now(trainer)
    torch.save(result, folder / f"process_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
