"""Nobody's name and no key is in what leaves the machine."""

import time
from pathlib import Path, PureWindowsPath

import pytest

from server.doctor.mask import Mask, this_user, without_password

ZHANG = Mask(["张三"], PureWindowsPath(r"C:\Users\张三"), ["DESKTOP-AB12"], ["s3cr3t-value", "x"])


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (r"C:\Users\张三\chatglm", r"<home>\chatglm"),
        (r'"path": "C:\\Users\\张三\\chatglm"', r'"path": "<home>\\chatglm"'),
        (r"OSError: 'C:\\\\Users\\\\张三\\\\x'", r"OSError: '<home>\\\\x'"),
        (r"c:\users\张三\x", r"<home>\x"),
        ("file:///C:/Users/%E5%BC%A0%E4%B8%89/x", "file:///<home>/x"),
        ("file:///C:/Users/%e5%bc%a0%e4%b8%89/x", "file:///<home>/x"),
        ("gbk %D5%C5%C8%FD", "gbk <user>"),
        (r'"\u5f20\u4e09"', '"<user>"'),
        ("D:/备份/张三/x", "D:/备份/<user>/x"),
        ("用户张三的文件", "用户<user>的文件"),
        (r"C:\Users\张三丰\x", r"C:\Users\<user>\x"),
        (r"C:\Users\ZHANGS~1\AppData", r"C:\Users\<user>\AppData"),
        (r"C:\Users\Public\x", r"C:\Users\Public\x"),
        ("from desktop-ab12 here", "from <computer> here"),
        ("http://me:pw@proxy:1/", "http://***@proxy:1/"),
        ("http://me:p@s/s@proxy:1/", "http://***@proxy:1/"),
        ("HTTP_PROXY=me:pw@proxy:1", "HTTP_PROXY=***@proxy:1"),
        ("zhang@example.com", "***"),
        ("Authorization: Basic abc==", "Authorization: ***"),
        ("x Bearer abc.def y", "x Bearer *** y"),
        ("sk-abcdefgh12345678", "***"),
        ("x hf_AbCdEfGhIjKl y", "x *** y"),
        ("api_key = 'abc'", "api_key = ***"),
        ('# my_password = "a \\" b"', "# my_password = ***"),
        ('key = """\na\nb"""\nport = 1', "key = ***\nport = 1"),
        ("token: two words", "token: ***"),
        ("password = ***starred", "password = ***"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("https://x/y?token=abc&n=1", "https://x/y?token=***&n=1"),
        ("prefix = '从前有一个'", "prefix = ***"),
        ("the value s3cr3t-value it is x", "the value *** it is x"),
        ("tokenizer.model", "tokenizer.model"),
        ("msvcp140_atomic_wait.dll, pkg_resources", "msvcp140_atomic_wait.dll, pkg_resources"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("tokens: 5, keys: 6, keep = 7", "tokens: 5, keys: 6, keep = 7"),
        ("max_length = 4096", "max_length = 4096"),
        ("PyTorch 2.13.0+cpu", "PyTorch 2.13.0+cpu"),
        ("Microsoft Basic Display Adapter", "Microsoft Basic Display Adapter"),
        ("http://127.0.0.1:5178", "http://127.0.0.1:5178"),
    ],
)
def test_names_and_keys_are_taken_out(text, masked):
    assert ZHANG(text) == masked
    assert ZHANG(masked) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("/home/li/chatglm", "<home>/chatglm"),
        ("/home/lisa/x", "/home/<user>/x"),
        ("/data/lisa/x", "/data/lisa/x"),
        ("/data/li/x", "/data/<user>/x"),
        ("(/data/li)", "(/data/<user>)"),
        ("/data/li;/x", "/data/<user>;/x"),
        ("client library", "client library"),
        ("line li ne", "line li ne"),
        ("li@pc", "<user>@pc"),
    ],
)
def test_a_short_name_is_no_part_of_words(text, masked):
    assert Mask(["li"], Path("/home/li"))(text) == masked


def test_a_longer_name_is_taken_out_as_a_word():
    mask = Mask(["maria"], Path("/home/maria"))
    assert mask("/home/maria/x of Maria, MARIA_1, mariadb") == "<home>/x of <user>, <user>_1, mariadb"


def test_names_of_several_words_and_letters_with_accents():
    mask = Mask(["Jörg Müller"], PureWindowsPath(r"C:\Users\Jörg Müller"))
    for text in (r"C:\Users\Jörg Müller", r"c:\users\JÖRG MÜLLER", "C:/Users/J%C3%B6rg%20M%C3%BCller"):
        assert mask(text) == "<home>"
    assert mask(ascii("von Jörg Müller")) == "'von <user>'"


def test_a_user_of_a_name_that_stands_everywhere():
    mask = Mask(["user"], Path("/home/user"))
    assert mask(mask("/home/user/x, /mnt/user/y")) == "<home>/x, /mnt/<user>/y"


@pytest.mark.parametrize("home", [None, Path("/")])
def test_without_a_home(home):
    assert Mask(["maria"], home)("/a//b of maria") == "/a//b of <user>"


@pytest.mark.parametrize("piece", ["a", ".", "/", "\n", "key", "a:", "# ", "@", "\\Users\\", "//a"])
def test_long_texts_of_no_sense_take_no_time(piece):
    started = time.monotonic()
    ZHANG(piece * (60_000 // len(piece)))
    assert time.monotonic() - started < 5


def test_values_of_every_kind():
    mask = Mask(["maria"])
    value = {"/maria/a": ["/maria/b", 1, None], "n": ({"c": "/maria"}, 2.5, True)}
    assert mask.everything(value) == {"/<user>/a": ["/<user>/b", 1, None], "n": [{"c": "/<user>"}, 2.5, True]}


def test_this_user_is_who_the_environment_says(monkeypatch, tmp_path):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "wangwu"))
    env = {"USERNAME": "zhangsan", "COMPUTERNAME": "PC-77", "MY_API_KEY": "geheimnis", "SOME_AUTH": "true"}
    said = this_user(env)(f"{tmp_path}/wangwu/x zhangsan wangwu PC-77 geheimnis true")
    assert said == "<home>/x <user> <user> <computer> *** true"


def test_this_user_may_have_no_home(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert this_user({"USER": "maria"})("of maria") == "of <user>"


@pytest.mark.parametrize("url", ["http://me:pw@proxy:1", "me:pw@proxy:1", "socks5://me@proxy:1", "http://me:p@w/@proxy:1"])
def test_proxies_without_their_passwords(url):
    assert without_password(url).removeprefix("http://").removeprefix("socks5://") == "***@proxy:1"
