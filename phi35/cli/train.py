"""The command line of a training run, shared by the scripts and ``phi35 train``."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

DESCRIPTION = """Train a model of the family. Every setting has a default; give others as key=value
(model_overrides.num_hidden_layers=4 reaches into a dict), or in a YAML file. Works under the deepspeed and torchrun
launchers and without one."""


def run(
    defaults: dict[str, Any],
    arguments: Sequence[str] | None = None,
    *,
    with_default_model: dict[str, Any] | None = None,
    description: str = DESCRIPTION,
) -> int:
    """Parses arguments, trains, and reports a user's mistakes as one line.

    Args:
        defaults: fields of ``TrainingConfig`` below what the user gives.
        arguments: command line; None takes the process's.
        with_default_model: further defaults, which hold only where the user leaves the default model.
        description: shown by --help.

    Returns:
        Exit status: 0; 2 for a mistake in the settings; 1 where the last checkpoint could not be written or the
        run diverged; 128 + the
        signal's number for a run that was asked to stop and has saved.
    """
    from phi35.training import environment
    from phi35.training.config import read_config
    from phi35.training.deepspeed_config import config_fields, read_deepspeed_file
    from phi35.training.health import RunDiverged
    from phi35.training.run import train
    from phi35.training.saving import SaveError
    from phi35.training.stopping import RunStopped

    options = _parser(description).parse_args(arguments)
    try:
        ready = read_deepspeed_file(options.deepspeed_config) if options.deepspeed_config else None
        below = {**defaults, **(config_fields(ready) if ready else {})}
        config = read_config(options.config, options.overrides, below)
        if with_default_model and config.model == defaults["model"]:
            config = read_config(options.config, options.overrides, {**with_default_model, **below})
        train(config, ready, options.device)
    except ValueError as error:
        print(f"error: {error}")
        return 2
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; the same command goes on from there", flush=True)
        return stopped.exit_status
    except (SaveError, RunDiverged) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        # This rank's traceback comes first, before the others notice; leaving the group in order could hang.
        print(f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    finally:
        environment.stop()
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of phi35/training/config.py")
    parser.add_argument("--config", help="YAML file of settings; key=value wins over it")
    parser.add_argument("--deepspeed_config", help="ready JSON file (deepspeed_configs/); must not contradict")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is a device")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser
