"""How ./launch.sh splits its words, lays ranks out, and what it refuses: without torch, ssh or a rank."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.host.local import LocalHost
from pipeline.launch import request as request_module
from pipeline.launch.__main__ import main
from pipeline.launch.hosts import parse_filter, read_hostfile
from pipeline.launch.layout import Launch, lay_out
from pipeline.launch.remote import environment_file
from pipeline.launch.request import Request, split


class FakeHost(LocalHost):
    """A machine with devices, cores, ports and neighbours of the test's choice."""

    def __init__(self, gpus: int = 0, cores: int = 2, environment: dict[str, str] | None = None, **traits: object):
        super().__init__(environment or {})
        self.present, self.core_count = gpus, cores
        self.commands: set[str] = {"pdsh", "ssh"}
        self.busy_ports: set[int] = set()
        self.silent_hosts: set[str] = set()
        self.own_names = {"localhost"}
        self.__dict__.update(traits)

    def _count_gpus(self) -> int:
        return self.present

    def cores(self) -> int:
        return self.core_count

    def has_command(self, name: str) -> bool:
        return name in self.commands

    def is_local(self, host: str) -> bool:
        return host in self.own_names

    def port_problem(self, port: int) -> str | None:
        return "address already in use" if port in self.busy_ports else None

    def free_port(self) -> int:
        return 40000

    def unreachable(self, hosts, ssh_port) -> list[str]:
        return [host for host in hosts if host in self.silent_hosts]


def launch(words: str, machine: LocalHost | None = None) -> Launch:
    return lay_out(split(words.split()), machine or FakeHost())


def flags(words: str, machine: LocalHost | None = None) -> set[str]:
    return set(launch(words, machine).flags)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def hostfile(tmp_path: Path, in_folder: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nworker-1 slots=4\n\nworker-2 slots=2  # the small one\n")
    return str(path)


@pytest.mark.parametrize(
    ("words", "launcher", "recipe", "recipe_flags"),
    [
        ("", {}, "miras_tiny", ()),
        ("olmo_1b --steps 3", {}, "olmo_1b", ("--steps", "3")),
        ("--steps 3", {}, "miras_tiny", ("--steps", "3")),
        ("--num_gpus 4 miras_tiny --lr 1", {"--num_gpus": "4"}, "miras_tiny", ("--lr", "1")),
        ("--num_gpus=4 --zero zero1", {"--num_gpus": "4"}, "miras_tiny", ("--zero", "zero1")),
        ("--num_accelerators 4 x", {"--num_gpus": "4"}, "x", ()),
        ("--no_ssh --node_rank 1 x", {"--no_ssh": None, "--node_rank": "1"}, "x", ()),
        ("-i localhost:0,1 x", {"--include": "localhost:0,1"}, "x", ()),
        ("--launcher_args -x=1 x y", {"--launcher_args": "-x=1"}, "x", ("y",)),
        ("--num_gpus 2 --config a.yaml", {"--num_gpus": "2"}, None, ("--config", "a.yaml")),
        ("--num_gpus 2 --num_gpus 3 x", {"--num_gpus": "3"}, "x", ()),
    ],
)
def test_split(words: str, launcher: dict, recipe: str | None, recipe_flags: tuple) -> None:
    assert split(words.split()) == Request(launcher, recipe, recipe_flags)


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
@pytest.mark.parametrize(("words", "run"), [("olmo_1b --steps 3", "olmo_1b --steps 3"), ("--num_gpus 2", "miras_tiny")])
def test_a_request_for_the_help_of_a_recipe_is_passed_on(
    flag: str, words: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        main([*words.split(), flag])
    assert started == [[sys.executable, "-m", "pipeline", "train", *run.split(), flag]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_gpus", "--num_gpus has no value"),
        ("--num_gpus --no_ssh x", "--num_gpus has no value"),
        ("--num_gpus two x", "--num_gpus is 'two': give a whole number"),
        ("--num_gpus 0 x", "--num_gpus is '0'"),
        ("--num_gpus -1 x", "--num_gpus is '-1'"),
        (f"--num_gpus {'9' * 5000} x", "--num_gpus is '999"),
        ("--master_port 70000 x", "--master_port is 70000"),
        ("--num-gpus 2 x", "did you mean --num_gpus?"),
        ("--num_gpu 2 x", "did you mean --num_gpus?"),
        ("--host_file h x", "did you mean --hostfile?"),
        ("x --num_gpus 2", "--num_gpus is a launcher flag: put it before the recipe"),
        ("x --hostfile=h", "--hostfile is a launcher flag: put it before the recipe"),
        ("--include a --exclude b x", "--include and --exclude are both given"),
        ("--include a --num_gpus 2 x", "--include and --num_gpus are both given"),
        ("--no_python x", "--no_python does not go with a recipe"),
        ("--autotuning run x", "--autotuning does not go with a recipe"),
        ("--launcher rsh x", "--launcher is 'rsh': give one of pdsh"),
        ("--master_addr -oProxyCommand=x x", "--master_addr is '-oProxyCommand=x'"),
        ("--log_level loud x", "--log_level is 'loud'"),
    ],
)
def test_split_refuses(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        split(words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_recipe_flag_is_taken_for_a_misspelt_launcher_flag() -> None:
    for field in dataclasses.fields(RunConfig):
        assert split(["--" + field.name.replace("_", "-"), "1"]).recipe == "miras_tiny"


def test_flags_are_those_of_the_installed_launcher() -> None:
    spec = importlib.util.find_spec("deepspeed")  # found, not imported
    assert spec and spec.origin
    source = Path(spec.origin).parent / "launcher" / "runner.py"
    valued, switches = set(), set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
            is_switch = any(k.arg == "action" and ast.unparse(k.value) == "'store_true'" for k in node.keywords)
            (switches if is_switch else valued).update(name for name in names if name.startswith("-"))

    def known(flags: frozenset[str]) -> set[str]:
        return set(flags) | {alias for alias, flag in request_module.ALIASES.items() if flag in flags}

    assert known(request_module.VALUE_FLAGS) == valued
    assert known(request_module.SWITCHES) == switches


def test_cpu_starts_two_ranks_or_as_many_as_are_asked_for() -> None:
    two = launch("")
    assert two.ranks == 2 and two.gpus == 0
    assert "--num_gpus=2" in two.flags
    assert two.environment["DS_ACCELERATOR"] == "cpu"
    assert two.environment["OMP_NUM_THREADS"] == "1"
    assert launch("--num_gpus 4 miras_tiny").ranks == 4  # more than the two cores
    assert launch("--include localhost:0,1,2 x").ranks == 3
    assert launch("--include localhost:0,1,2 x").environment["LOCAL_SIZE"] == "3"
    assert launch("--exclude localhost:1 x").ranks == 1


def test_threads_share_the_cores() -> None:
    assert launch("--num_gpus 3 x", FakeHost(cores=8)).environment["OMP_NUM_THREADS"] == "2"
    chosen = FakeHost(environment={"OMP_NUM_THREADS": "5"})
    assert "OMP_NUM_THREADS" not in launch("", chosen).environment


def test_gpus_are_all_used_and_never_exceeded() -> None:
    all_of_them = launch("", FakeHost(gpus=4))
    assert all_of_them.ranks == 4 and all_of_them.gpus == 4
    assert not any(flag.startswith(("--num_gpus", "--include")) for flag in all_of_them.flags)
    assert "DS_ACCELERATOR" not in all_of_them.environment
    with pytest.raises(UserError, match="--num_gpus is 5, but localhost has 4 GPUs"):
        launch("--num_gpus 5 x", FakeHost(gpus=4))
    with pytest.raises(UserError, match="no slot 4: localhost has 4 GPUs"):
        launch("--include localhost:0,4 x", FakeHost(gpus=4))


def test_visible_gpus_stay_the_chosen_ones() -> None:
    machine = FakeHost(gpus=8, environment={"CUDA_VISIBLE_DEVICES": "5,2,7"})
    assert launch("", machine).ranks == 3
    assert "--include=localhost:5,2" in flags("--num_gpus 2 x", machine)
    assert launch("", machine).environment["CUDA_VISIBLE_DEVICES"] is None
    with pytest.raises(UserError, match="3 visible GPUs"):
        launch("--num_gpus 4 x", machine)


@pytest.mark.parametrize(
    "hidden", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"DS_ACCELERATOR": "cpu"}]
)
def test_hidden_gpus_mean_the_cpu(hidden: dict[str, str]) -> None:
    assert launch("", FakeHost(gpus=8, environment=hidden)).environment["DS_ACCELERATOR"] == "cpu"


def test_devices_that_cannot_be_used_are_named() -> None:
    with pytest.raises(UserError, match="UUID"):
        launch("", FakeHost(gpus=8, environment={"CUDA_VISIBLE_DEVICES": "GPU-1234"}))
    with pytest.raises(UserError, match="torch sees no GPU"):
        launch("", FakeHost(environment={"DS_ACCELERATOR": "cuda"}))
    with pytest.raises(UserError, match="give cuda or cpu"):
        launch("", FakeHost(environment={"DS_ACCELERATOR": "tpu"}))


def test_only_a_named_hostfile_is_used() -> None:
    assert "--hostfile=/dev/null" in flags("")


def test_read_hostfile(hostfile: str) -> None:
    assert read_hostfile(hostfile) == {"worker-1": 4, "worker-2": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# worker-1 slots=8\n", "names no host"),
        ("worker-1\n", "line 1: 'worker-1' is not `HOST slots=N`"),
        ("worker-1 slots=8\nworker-2 slots=many\n", "line 2"),
        ("worker-1 slots=8 cpus=2\n", "line 1"),
        ("worker-1 slots=0\n", "has no slots"),
        ("a slots=1\na slots=2\n", "line 2: a is named twice"),
        ("-oProxyCommand=touch slots=1\n", "is not a host name"),
        ("$(touch,x) slots=1\n", "is not a host name"),
        ("a;b slots=1\n", "is not a host name: give letters, digits, dots, hyphens and underscores"),
        ("alice@node-1 slots=8\n", "write node-1 alone, and its user in ~/.ssh/config (Host node-1, User alice)"),
        ("node-1:2222 slots=8\n", "leave the port out and give --ssh_port"),
        ("fe80::1 slots=8\n", "name an IPv6 address in ~/.ssh/config or /etc/hosts"),
        ("\ufeffnode-1 slots=8\n", "save the file without a byte order mark"),
        ("node-1 8\n", "give a host, a space, slots= and the number of its GPUs"),
        ("x" * 5000 + "\n", "..."),
        # DeepSpeed, which reads the file as well, would see one line here.
        ("node-1 slots=8\x0cnode-2 slots=8\n", "line 1"),
        ("node-1 slots=8\u2028node-2 slots=8\n", "line 1"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bad_hostfile(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_hostfile(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_hostfile_may_end_its_lines_as_windows_does(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"node-1 slots=8\r\n\r\n# two\r\nnode-2 slots=4 # four\r\n")
    assert read_hostfile(str(tmp_path / "hosts")) == {"node-1": 8, "node-2": 4}


def test_hostfile_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_hostfile(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(str(tmp_path))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_hostfile(str(binary))


def test_parse_filter() -> None:
    assert parse_filter("--include", "a@b:0,2") == {"a": [], "b": [0, 2]}
    for text in ("", "a:", "a:x", "a:0,", "@a", "a b"):
        with pytest.raises(UserError):
            parse_filter("--include", text)


@pytest.mark.parametrize(
    ("words", "hosts"),
    [
        ("", {"worker-1": [0, 1, 2, 3], "worker-2": [0, 1]}),
        ("--num_nodes 1", {"worker-1": [0, 1, 2, 3]}),
        ("--num_gpus 2", {"worker-1": [0, 1], "worker-2": [0, 1]}),
        ("--include worker-2@worker-1:3,1", {"worker-1": [1, 3], "worker-2": [0, 1]}),
        ("--exclude worker-1:0@worker-2", {"worker-1": [1, 2, 3]}),
    ],
)
def test_slots_of_a_hostfile(hostfile: str, words: str, hosts: dict[str, list[int]]) -> None:
    chosen = launch(f"--hostfile {hostfile} {words} x", FakeHost(gpus=8))
    assert chosen.hosts == hosts
    assert chosen.ranks == sum(map(len, hosts.values()))
    assert f"--hostfile={hostfile}" in chosen.flags
    assert "--force_multi" in chosen.flags  # also when one remote host is left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_nodes 3", "--num_nodes is 3"),
        ("--num_gpus 3", "--num_gpus is 3, but worker-2 has 2 slots"),
        ("--include worker-3", "worker-3 is not one of worker-1, worker-2"),
        ("--include worker-2:2", "no slot 2: worker-2 has 2 slots"),
        ("--exclude worker-1@worker-2", "leaves no rank"),
        ("--no_ssh", "give --node_rank"),
        ("--no_ssh --node_rank 2", "give --node_rank"),
        ("--no_ssh --node_rank 0", "give --master_addr"),
        ("--launcher mpich", "mpirun is not installed"),
    ],
)
def test_hostfile_launches_that_cannot_start(hostfile: str, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(f"--hostfile {hostfile} {words} x", FakeHost())


def test_hosts_are_reached_before_ranks_start(hostfile: str) -> None:
    words = f"--hostfile {hostfile} x"
    with pytest.raises(UserError, match="pdsh is not installed"):
        launch(words, FakeHost(commands=set()))
    with pytest.raises(UserError, match="no ssh without a password to worker-2:"):
        launch(words, FakeHost(silent_hosts={"worker-2"}))
    assert launch(f"--no_ssh_check {words}", FakeHost(silent_hosts={"worker-2"})).ranks == 6


def test_this_machine_needs_no_ssh_and_has_the_slots_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost slots=4\n")
    chosen = flags(f"--hostfile {path} --num_gpus 2 x", FakeHost(commands=set()))
    assert {"--no_ssh_check", "--master_addr=127.0.0.1", "--master_port=40000"} <= chosen
    with pytest.raises(UserError, match="localhost has 4 slots but 2 GPUs"):
        launch(f"--hostfile {path} x", FakeHost(gpus=2))
    assert launch(f"--hostfile {path} x", FakeHost(gpus=0, cores=1)).ranks == 4


def test_nodes_started_by_hand(hostfile: str) -> None:
    words = f"--hostfile {hostfile} --no_ssh --node_rank {{}} --master_addr 10.0.0.1 x"
    busy = FakeHost(commands=set(), busy_ports={29500})
    assert launch(words.format(1), busy).ranks == 6  # the port belongs to node 0, which has taken it
    with pytest.raises(UserError, match="port 29500 cannot be used"):
        launch(words.format(0), busy)


def test_ports() -> None:
    assert "--master_port=40000" in flags("")
    assert "--master_port=29501" in flags("--master_port 29501 x")
    with pytest.raises(UserError, match=r"--master_port: port 29501 cannot be used .*already in use.*: give another"):
        launch("--master_port 29501 x", FakeHost(busy_ports={29501}))
    for words, message in (
        ("--force_multi x", "--force_multi"),
        ("--num_nodes 2 x", "--num_nodes"),
        ("--node_rank 1 x", "--"),
    ):
        with pytest.raises(UserError, match=message):
            launch(words)


def test_a_port_in_use_is_seen() -> None:
    machine = LocalHost(os.environ)
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "")):
        with socket.socket(family) as listener:
            listener.bind((address, 0))
            listener.listen()
            assert machine.port_problem(listener.getsockname()[1]) == "address already in use"
    assert machine.port_problem(machine.free_port()) is None


def test_this_machine_knows_its_names() -> None:
    machine = LocalHost(os.environ)
    assert machine.is_local("localhost") and machine.is_local("127.0.0.1") and machine.is_local(socket.gethostname())
    assert not machine.is_local("192.0.2.1")  # reserved for documentation
    assert not machine.is_local("no-such-host.invalid")


def test_command_and_check() -> None:
    made = launch("--num_gpus 2 --bind_core_list 0-1 --module olmo_1b --steps 3")
    command = made.command()
    assert command[-6:] == ["--module", "pipeline", "train", "olmo_1b", "--steps", "3"]
    assert command.count("--module") == 1
    assert "--bind_core_list=0-1" in command
    assert made.check_command()[1:] == [
        *("-m", "pipeline", "check", "olmo_1b", "--steps", "3"),
        *("--launch-ranks", "2", "--launch-nodes", "1", "--launch-gpus-per-node", "0"),
    ]


def test_core_binding_needs_numactl() -> None:
    with pytest.raises(UserError, match="numactl is not installed"):
        launch("--bind_cores_to_rank x")
    assert "--bind_cores_to_rank" in flags("--bind_cores_to_rank x", FakeHost(commands={"numactl"}))


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", "--hostfile", "absent", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(request_module.__file__).parents[2])},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "launch.sh: --hostfile absent: no such file\n"
    assert result.stdout == ""
    assert set(tmp_path.iterdir()) == before


def test_launching_loads_nothing_heavy() -> None:
    heavy = ("torch", "deepspeed", "numpy", "tyro")
    loaded = "import sys, pipeline.launch.supervise, pipeline.launch.__main__"
    script = f"{loaded}; print([name for name in {heavy} if name in sys.modules])"
    root = str(Path(request_module.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert result.stdout.strip() == "[]"


def test_the_nodes_get_what_their_ranks_need(hostfile: str, in_folder: Path) -> None:
    settings = {
        "PATH": "/venv/bin:/usr/bin", "GLOO_SOCKET_IFNAME": "eth0", "HF_TOKEN": "secret", "EDITOR": "vi",
        "NCCL_DEBUG_FILE": "/tmp/%h.log", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4",
    }  # fmt: skip
    (in_folder / "home" / ".deepspeed_env").write_text("# mine\n\nHF_HOME=/shared/hf\nOMP_NUM_THREADS=2\n")
    (in_folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=8\nNOTE=two words; and more\n")
    made = launch(f"--hostfile {hostfile} x", FakeHost(environment=settings))
    assert made.launcher == "pdsh"
    assert made.exports == {
        "PATH": "/venv/bin:/usr/bin", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG_FILE": "/tmp/%h.log",
        "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8", "HF_HOME": "/shared/hf", "NOTE": "two words; and more",
    }  # fmt: skip
    assert "NCCL_DEBUG_FILE=/tmp/%%h.log\n" in environment_file(made.exports, "pdsh")
    # One's own devices say nothing about those of the nodes.
    assert "DS_ACCELERATOR" not in made.exports
    assert launch(f"--hostfile {hostfile} x", FakeHost(own_names={"worker-2"})).exports["DS_ACCELERATOR"] == "cpu"
    assert launch("x", FakeHost(environment=settings)).exports == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export A=1", "line 1: not NAME=VALUE"),
        ("A", "line 1: not NAME=VALUE"),
        ("A B=1", "line 1: not NAME=VALUE"),
        ("A;touch x=1", "line 1: not NAME=VALUE"),
        ("A=$(touch x)", "line 1: A has '$'"),
        ("A=`touch x`", "line 1: A has '`'"),
        ('A="two words"', "line 1: A has '\"'"),
        ("A=a\\", "line 1: A has '\\\\'"),
    ],
)
def test_an_environment_file_is_no_shell_script(hostfile: str, in_folder: Path, line: str, message: str) -> None:
    (in_folder / ".deepspeed_env").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        launch(f"--hostfile {hostfile} x")
    assert ".deepspeed_env" in str(error.value) and message in str(error.value)
    assert launch("x").ranks == 2  # one node: DeepSpeed does not read it


def test_variables_that_deepspeed_passes_on_are_checked(hostfile: str, in_folder: Path) -> None:
    with pytest.raises(UserError, match="environment variable NCCL_X has '`'"):
        launch(f"--hostfile {hostfile} x", FakeHost(environment={"NCCL_X": "`touch x`"}))


def test_secrets_on_command_lines_are_warned_of(hostfile: str, in_folder: Path) -> None:
    (in_folder / ".deepspeed_env").write_text("HF_TOKEN=hf_x\n")
    (warning,) = launch(f"--hostfile {hostfile} x").warnings()
    assert "HF_TOKEN" in warning and "hf_x" not in warning
    assert launch("x").warnings() == []


def test_a_silent_node_ends_its_ssh_session(hostfile: str, in_folder: Path) -> None:
    mine = FakeHost(environment={"PDSH_SSH_ARGS_APPEND": "-i key -o ServerAliveInterval=3"})
    options = str(launch(f"--hostfile {hostfile} x", mine).environment["PDSH_SSH_ARGS_APPEND"])
    assert options.startswith("-i key -o ServerAliveInterval=3 ") and "ServerAliveCountMax" in options


def test_the_user_of_a_node_is_the_one_that_ssh_is_told_of(hostfile: str, in_folder: Path) -> None:
    """Some builds of pdsh name the local user, against which ~/.ssh/config counts nothing."""
    assert "%u" not in str(launch(f"--hostfile {hostfile} x").environment["PDSH_SSH_ARGS"])
    mine = FakeHost(environment={"PDSH_SSH_ARGS": "-l%u %h"})
    assert launch(f"--hostfile {hostfile} x", mine).environment["PDSH_SSH_ARGS"] == "-l%u %h"


@pytest.mark.parametrize("launcher", ["slurm", "openmpi", "mvapich"])
def test_launchers_whose_ranks_do_not_know_their_number(hostfile: str, launcher: str) -> None:
    with pytest.raises(UserError, match="tells its ranks no numbers"):
        launch(f"--hostfile {hostfile} --launcher {launcher} x")


def test_words_pass_through_the_shell_of_a_node(hostfile: str, in_folder: Path) -> None:
    words = [
        "x",
        "--data.path",
        "a;b",
        "$HOME/*",
        "two `words` $HOME \\ \"quoted\" 'so'",
        "",
        "%h 100%",
        "%n",
        "a'b",
        "~",
    ]
    made = lay_out(split(["--hostfile", hostfile, *words]), FakeHost())
    sent = made.command()[made.command().index("train") + 1 :]
    # What DeepSpeed's PDSHRunner.parse_user_args and pdsh itself make of them.
    told = [f'"{word.replace(chr(34), chr(92) + chr(34))}"' if " " in word else word for word in sent]
    line = re.sub("%([hnu%])", lambda match: "%" if match[1] == "%" else "EXPANDED", " ".join(told))
    script = f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))' {line}"
    got = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(got) == words


def test_folders_that_a_node_would_take_apart(hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="the current folder is"):
        launch(f"--hostfile {hostfile} x")
    assert launch("x").ranks == 2
