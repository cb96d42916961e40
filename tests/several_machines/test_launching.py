"""Ranks on several machines: each rank's place from torchrun's, the user's or SLURM's variables, real scripts on two
"machines" of this one, and an output folder that not all of them see."""

import json
import os
import random
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_distributed
from picture_shards import write_picture_shards
from training_runs import text_files

from phi35.training import environment
from phi35.training.slurm import FIRST_PORT, NUM_PORTS, first_host, place_in_step

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
}
QUICK = ["max_steps=2", "warmup_steps=1", "global_batch_size=4", "sequence_length=32", "trackers=[]", "export=false"]


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node7", "node7"),
        ("a.b,c", "a.b"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[1,3]-ib", "gpu1-ib"),
        ("rack[1-2]node[3-4],x", "rack1node3"),
        ("h[001-128]", "h001"),
    ],
)
def test_the_first_host_of_a_node_list(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "h[1", ",a", "[1-2"])
def test_what_is_no_node_list(node_list):
    with pytest.raises(ValueError, match="list of hosts as SLURM writes them"):
        first_host(node_list)


def test_a_task_of_srun_has_a_place():
    place = place_in_step(STEP)
    assert {name: place[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == dict(
        RANK="3", WORLD_SIZE="4", LOCAL_RANK="1"
    )
    assert place["MASTER_ADDR"] == "gpu07" and FIRST_PORT <= int(place["MASTER_PORT"]) < FIRST_PORT + NUM_PORTS
    assert place == {**place_in_step({**STEP, "SLURM_PROCID": "0"}), "RANK": "3"}
    other = place_in_step({**STEP, "SLURM_STEP_ID": "3"})
    assert other["MASTER_PORT"] != place["MASTER_PORT"]
    given = place_in_step({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert set(given) == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


def test_a_batch_script_and_a_single_task_are_alone():
    batch = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}
    assert place_in_step({**batch, "SLURM_NTASKS": "4"}) == place_in_step({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_step_that_says_too_little():
    with pytest.raises(ValueError, match=r"lacks \['SLURM_LOCALID'\].*torchrun"):
        place_in_step({**STEP, "SLURM_LOCALID": ""})
    with pytest.raises(ValueError, match="SLURM_PROCID is 4, of 4 tasks"):
        place_in_step({**STEP, "SLURM_PROCID": "4"})


@pytest.mark.parametrize(("count", "local_rank", "index"), [(8, 5, 5), (1, 0, 0), (1, 5, 0)])
def test_a_process_takes_its_gpu_of_those_it_sees(count, local_rank, index):
    assert environment._gpu_index(local_rank, count) == index


def test_a_process_without_a_gpu_of_its_own():
    with pytest.raises(ValueError, match="process 2 of this machine sees 2 GPUs"):
        environment._gpu_index(2, 2)


def run_script(rank, world_size, variables, script, arguments, folder):
    """A script as the only process of its machine: exit status, and the place it took."""
    port = os.environ["MASTER_PORT"]
    for name in (*environment.LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update({name: value.format(rank=rank, port=port) for name, value in variables.items()})
    os.chdir(folder)
    sys.argv = [script, "--device", "cpu", *arguments]
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as stopped:
        return stopped.code, {name: os.environ[name] for name in environment.LAUNCHER_VARIABLES}


def free_job():
    """A job number whose port nothing listens on."""
    while True:
        job = random.randrange(10**6)
        port = int(place_in_step({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"})["MASTER_PORT"])
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                return job


LIKE_TORCHRUN = {
    "RANK": "{rank}",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "{rank}",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "{port}",
}


def losses(folder):
    return [json.loads(line)["loss"].hex() for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scripts_train_on_two_machines_under_torchrun_and_srun(tmp_path):
    """Text with experts over both, from the variables of either; pictures under srun."""
    like_srun = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(free_job()),
    }
    text = [*QUICK, f"data={text_files(tmp_path)}"]
    for name, variables in (("torchrun", LIKE_TORCHRUN), ("srun", like_srun)):
        arguments = [*text, f"output_dir={tmp_path / name}"]
        done = run_distributed(run_script, 2, variables, "train_moe.py", arguments, str(tmp_path), init=False)
        assert [(status, place["RANK"], place["LOCAL_RANK"]) for status, place in done] == [
            (0, "0", "0"),
            (0, "1", "0"),
        ]
        assert all(place["WORLD_SIZE"] == "2" for _, place in done)
        assert "ep_size: 2" in (tmp_path / name / "training_config.yaml").read_text()
    assert len(losses(tmp_path / "srun")) == 2 and losses(tmp_path / "srun") == losses(tmp_path / "torchrun")
    shards = write_picture_shards(tmp_path / "shards")
    pictures = [*QUICK, "model_overrides.vision={num_crops: 1}", f"data={shards}", f"output_dir={tmp_path / 'vision'}"]
    done = run_distributed(run_script, 2, like_srun, "train_vision.py", pictures, str(tmp_path), init=False)
    assert [status for status, _ in done] == [0, 0] and len(losses(tmp_path / "vision")) == 2


def train_in_a_folder_of_its_own(rank, world_size, values, folder):
    from phi35.training import shared_folder
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    shared_folder.SECONDS = 0.5
    own = Path(folder) / f"machine-{rank}"
    own.mkdir()
    os.chdir(own)
    try:
        train(TrainingConfig(**values), device="cpu")
    except ValueError as error:
        return str(error)


def test_an_output_folder_that_only_one_machine_sees_is_an_error_on_all(tmp_path):
    values = {"data": text_files(tmp_path), "output_dir": "run", "global_batch_size": 2, "trackers": []}
    told = run_distributed(train_in_a_folder_of_its_own, 2, values, str(tmp_path), init=False)
    assert told[0] == told[1] and "'run' is not the same folder for all processes: rank 1 on" in told[0]
    assert "machine-1" in told[0] and "absolute path" in told[0]
    assert not list((tmp_path / "machine-0" / "run").iterdir())


def test_the_ready_batch_script_asks_for_a_valid_run():
    from phi35.training.config import read_config
    from phi35.training.deepspeed_config import config_fields, merge, read_deepspeed_file, to_deepspeed

    script = (ROOT / "examples" / "train_on_several_machines.sbatch").read_text()
    nodes, ranks = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("nodes", "ntasks-per-node"))
    command = script[script.index("srun --kill") : script.index("status=")]
    given = read_deepspeed_file(ROOT / re.search(r"--deepspeed_config (\S+)", command)[1])
    settings = [word for word in shlex.split(command.replace("\\\n", " ")) if re.match(r"[a-z_]+=", word)]
    config = read_config(None, settings, config_fields(given)).resolve(world_size=nodes * ranks, num_experts=16)
    assert config.ep_size == nodes * ranks == 16 and config.save_interval and config.global_batch_size == 128
    merge(to_deepspeed(config, nodes * ranks, "cuda"), given)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
