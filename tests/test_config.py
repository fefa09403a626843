import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server import config
from server.config import COMMANDS, ROWS, Config, parse
from server.errors import StartupError
from server.option_types import flag, variable


@pytest.fixture
def root(tmp_path):
    return tmp_path


def failure(argv=(), env=None, **keywords) -> StartupError:
    with pytest.raises(StartupError) as caught:
        parse(argv, env=env or {}, **keywords)
    for sentence in (caught.value.zh, caught.value.en):
        assert sentence.strip().endswith(("。", ".")) and "\n" not in sentence
    return caught.value


def test_defaults(root):
    found = parse([], env={}, root=root)
    assert found == dataclasses.replace(Config(), language="en", chat_log=root / "chatlog.log")
    assert (found.model, found.host, found.port) == (None, "127.0.0.1", 5178)


def test_my_chatglm2_flags(root):
    found = parse(["-q", "4", "-H", "0.0.0.0", "-P", "5178"], env={}, root=root)
    assert (found.quantize, found.host, found.port) == (4, "0.0.0.0", 5178)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("given", "device"), [("-1", "cpu"), ("0", "cuda:0"), ("0,1", "cuda:0,1")])
def test_web_stream_flags(bits, given, device, root):
    argv = ["--host", "127.0.0.1", "--port", "8800", "--quantize", str(bits), "--device", given]
    found = parse(argv, env={}, root=root)
    assert (found.host, found.port, found.quantize, found.device) == ("127.0.0.1", 8800, bits, device)


@pytest.mark.parametrize("given", ["-1", "0", "'0,1'", '"0"'])
def test_numbers_of_gpus_in_a_file(given, root):
    (root / "config.toml").write_text(f"device = {given}\n", encoding="utf-8")
    wanted = {"-1": "cpu", "0": "cuda:0", "'0,1'": "cuda:0,1", '"0"': "cuda:0"}[given]
    assert parse([], env={}, root=root).device == wanted


def test_later_sources_win(root):
    (root / "config.toml").write_text("port = 1\nslots = 1\nqueue = 1\n", encoding="utf-8")
    found = parse(["--port", "3"], env={"CHATGLM_PORT": "2", "CHATGLM_SLOTS": "2"}, root=root)
    assert (found.port, found.slots, found.queue) == (3, 2, 1)


def test_argv_can_take_back_what_the_file_says(root):
    (root / "config.toml").write_text("slots = 3\nbrowser = true\n", encoding="utf-8")
    found = parse(["--slots", "auto", "--no-browser"], env={}, root=root)
    assert found.slots is None and found.browser is False


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--quantize", "0"], "quantize", 16),
        (["-q16"], "quantize", 16),
        (["--no-chat-log"], "chat_log", None),
        (["--chat-log=none"], "chat_log", None),
        (["--chat-log", "a.log"], "chat_log", Path.cwd() / "a.log"),
        (["--ptuning", "checkpoint-3000"], "ptuning", Path.cwd() / "checkpoint-3000"),
        (["--lora", "adapters/a"], "lora", Path.cwd() / "adapters/a"),
        (["--lora", "none"], "lora", None),
        (["--browser"], "browser", True),
        (["--cors", "http://a/, http://b"], "cors", ("http://a", "http://b")),
        (["--cors", "none"], "cors", ()),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--device", "-1"], "device", "cpu"),
        (["--device=-1"], "device", "cpu"),
        (["--device", "0"], "device", "cuda:0"),
        (["--device", "1,0"], "device", "cuda:1,0"),
        (["--glm-api-stream", "delta"], "glm_api_stream", "delta"),
        (["--port", "0"], "port", 0),
        (["--language", "zh"], "language", "zh"),
        (["--max-length", "auto"], "max_length", None),
        (["--keep", "auto"], "keep", None),
        (["--keep", "0"], "keep", 0),
        (["--speculate", "auto"], "speculate", None),
        (["--speculate", "0"], "speculate", 0),
        (["--speculate", "15"], "speculate", 15),
        (["--model", "chatglm3-6b"], "model", "chatglm3-6b"),
        (["--model", "auto"], "model", None),
    ],
)
def test_values(argv, name, value, root):
    assert getattr(parse(argv, env={}, root=root), name) == value


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "abc"], ["--port", "65536"], ["--port", "-1"], ["--port="], ["-q", "5"], ["--profile", "huge"],
        ["--device", "gpu"], ["--slots", "0"], ["--max-length", "1"], ["--model", " "], ["--endpoint", "hf-mirror.com"],
        ["--chat-log", ""], ["--host", ""], ["--device", "-2"], ["--device", "0,"], ["--device", "0,x"],
        ["--glm-api-stream", "both"], ["--speculate", "16"], ["--speculate", "off"],
        ["--keep", "257"],
    ],
)  # fmt: skip
def test_bad_value_on_argv(argv):
    error = failure(argv)
    name = argv[0].split("=")[0]
    full = "--quantize" if name == "-q" else name
    assert full in error.en and "on the command line" in error.en and "命令行" in error.zh
    assert ROWS[error.param].metadata["kind"].en in error.en


def test_bad_value_elsewhere(root):
    assert "CHATGLM_PORT in the environment" in failure(env={"CHATGLM_PORT": "x"}).en
    file = root / "my.toml"
    file.write_text("port = 'x'\n", encoding="utf-8")
    error = failure(["--config", str(file)])
    assert str(file) in error.en and str(file) in error.zh


@pytest.mark.parametrize(
    ("argv", "near"),
    [(["--prot", "1"], "--port"), (["--max_length", "9"], "--max-length"), (["--modle=x"], "--model"),
     (["--no-browse"], "--no-browser")],
)  # fmt: skip
def test_unknown_option_names_the_nearest(argv, near):
    assert f"Did you mean {near}?" in failure(argv).en


def test_unknown_word_is_refused():
    assert "surprise" in failure(["surprise"]).en


def test_abbreviations_are_refused():
    failure(["--por", "1"])


def test_missing_and_surplus_values():
    assert failure(["--port"]).en.startswith("--port needs a value")
    assert failure(["--browser=1"]).en.startswith("--browser takes no value")


def test_unknown_variable():
    error = failure(env={"CHATGLM_PROFIL": "small"})
    assert "Did you mean CHATGLM_PROFILE?" in error.en


def test_variables_of_others_are_left_alone(root):
    env = {"PORT": "x", "HF_HOME": "y", "CHATGLM_LANG": "zh", "CHATGLM_PORT": ""}
    assert parse([], env=env, root=root).port == 5178


def test_endpoint_has_its_usual_name(root):
    assert parse([], env={"HF_ENDPOINT": "https://hf-mirror.com"}, root=root).endpoint == "https://hf-mirror.com"


def test_file_as_notepad_writes_it(root):
    (root / "config.toml").write_bytes("\ufeffmax-length = 2048\r\nmodel = 'D:\\模型'\r\n".encode())
    found = parse([], env={}, root=root)
    assert (found.max_length, found.model, found.config) == (2048, "D:\\模型", root / "config.toml")


def test_file_types(root):
    (root / "config.toml").write_text('cors = ["http://a", "http://b"]\nchat_log = false\nbrowser = true\n')
    found = parse([], env={}, root=root)
    assert (found.cors, found.chat_log, found.browser) == (("http://a", "http://b"), None, True)


def test_relative_paths_start_where_they_are_written(root):
    (root / "sub").mkdir()
    (root / "sub" / "c.toml").write_text("chat_log = 'x.log'")
    found = parse([], env={"CHATGLM_CONFIG": str(root / "sub" / "c.toml")}, root=root)
    assert found.chat_log == root / "sub" / "x.log"
    (root / "sub" / "c.toml").write_text("lora = 'adapter'\nptuning = '../tuned'")
    found = parse([], env={"CHATGLM_CONFIG": str(root / "sub" / "c.toml")}, root=root)
    assert (found.lora, found.ptuning) == (root / "sub" / "adapter", root / "sub" / "../tuned")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prot = 1", "Did you mean port?"),
        (b"config = 'x'", "Unknown option config"),
        (b"[server]\nport = 1", "Unknown option server"),
        (b"port = 1.5", "port"),
        (b"port = [1]", "port"),
        (b"browser = 2", "browser"),
        (b"port = ", "not valid TOML"),
        (b'model = "D:\\models"', "single quotes"),
        ("model = '模型'".encode("gbk"), "UTF-8"),
    ],
)
def test_bad_file(content, said, root):
    (root / "config.toml").write_bytes(content)
    error = failure(root=root)
    assert said in error.en
    assert "config.toml" in error.en and "config.toml" in error.zh


def test_file_that_is_not_there(root):
    assert "nowhere.toml" in failure(["--config", str(root / "nowhere.toml")]).en


def test_file_can_be_switched_off(root):
    (root / "config.toml").write_text("port = 1")
    assert parse(["--config", "none"], env={}, root=root).port == 5178


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_help_shows_the_commands_options_with_their_defaults(command, language, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([command, "--help", "--language", language], env={}, program="python -m server")
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith(("用法：" if language == "zh" else "usage: ") + "python -m server")
    for name, row in ROWS.items():
        shown = row.metadata[language] in page
        assert shown == (variable(row) + "]" in page) == (command in row.metadata["commands"])
        assert not shown or flag(name) + " " in page or flag(name) + "," in page
    assert ("5178" in page) == (command in ("serve", "doctor"))
    assert "; " not in page if language == "zh" else "；" not in page
    assert "  test " not in page


def test_help_of_run_sh_names_its_other_use(capsys):
    for language in ("zh", "en"):
        with pytest.raises(SystemExit):
            parse(["--help", "--language", language], env={}, program="./run.sh")
        assert "\n  test " in capsys.readouterr().out


def test_options_of_other_commands_are_refused_on_the_command_line_alone(root):
    assert "--port" in failure(["chat", "--port", "1"]).en
    assert parse(["serve", "--port", "1"], env={}, root=root).port == 1
    assert parse(["chat"], env={"CHATGLM_PORT": "1"}, root=root).port == 1


def test_a_command_that_is_nearly_one():
    assert "Did you mean spool?" in failure(["spol"]).en


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--version"], env={})
    assert caught.value.code == 0 and capsys.readouterr().out == f"chatglm-portable {config.VERSION}\n"
    project = (config.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == config.VERSION


def test_device_is_allowed_as_help_writes_it():
    error = failure(["--device", "gpu"])
    assert "cuda:N" in error.en and "cuda:N" in error.zh


def test_what_the_launchers_say_is_no_option(root):
    parse([], env={"CHATGLM_COMMAND": "./run.sh"}, root=root)


def test_mistakes_are_found_without_reading_the_file(root):
    """Which takes a package on Python 3.10 that may not be there yet."""
    (root / "config.toml").write_text("port = ")
    assert "--port" in failure(["--port", "x"], root=root).en
    assert "CHATGLM_PORT" in failure(env={"CHATGLM_PORT": "x"}, root=root).en


@pytest.mark.parametrize(
    ("argv", "env", "expected"),
    [
        (["--language", "zh"], {}, "zh"),
        (["--language=en"], {"LANG": "zh_CN"}, "en"),
        (["--language"], {"CHATGLM_LANG": "zh"}, "zh"),
        (["--port", "x"], {"CHATGLM_LANG": "zh"}, "zh"),
        ([], {"CHATGLM_LANG": "zh"}, "zh"),
        ([], {}, "en"),
    ],
)
def test_language_before_the_options_are_read(argv, env, expected):
    assert config.language_of(argv, env) == expected


def test_importing_is_light():
    heavy = "{'torch', 'numpy', 'flask', 'pydantic', 'huggingface_hub', 'psutil'} & set(sys.modules)"
    code = f"import sys, server.config, server.hardware, server.profiles; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=config.ROOT)
    assert done.stdout.strip() == "set()"
