import pytest

from server.i18n import system_language

posix = pytest.mark.skipif("os.name == 'nt'", reason="on Windows the display language decides")


@pytest.mark.parametrize(("value", "expected"), [("zh", "zh"), ("en", "en"), ("zh_CN", "zh"), ("EN", "en")])
def test_variable_decides(value, expected):
    assert system_language({"CHATGLM_LANG": value, "LANG": "fr_FR.UTF-8"}) == expected


@posix
@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "zh_TW", "LANG": "C"}, "zh"),
        ({"CHATGLM_LANG": "auto", "LANG": "zh_CN"}, "zh"),
    ],
)
def test_locale(env, expected):
    assert system_language(env) == expected
