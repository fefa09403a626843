"""Every option of the program: one row each, a field of ``Config``.

The command line, the environment, the configuration file, ``--help`` and the error texts are all made from these rows.
What comes later wins: default, file, environment, command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.help_page import COMMANDS
from server.option_types import (
    BITS,
    DEVICE,
    FILE,
    FLAG,
    FOLDER,
    HOST,
    LOG,
    MODEL,
    NAME,
    ORIGINS,
    SERVER,
    SOURCES,
    TEXT,
    URL,
    Kind,
    choice,
    integer,
    number,
)

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.1.0"  # pyproject.toml says the same
COMMAND = "CHATGLM_COMMAND"  # no option: how the launchers tell what the user typed to start them
HTTP = ("serve",)  # the commands that options of the HTTP server belong to
WHERE = ("serve", "doctor")  # the commands that look at the server's address
CHAT = ("chat",)
DOWNLOAD = ("download",)
DOCTOR = ("doctor",)
RUNNING = ("serve", "chat", "spool", *DOCTOR)  # the commands that run a model, or say how it would run
MANY = ("serve", "spool")  # the commands that keep what they answer in a log
SHARED = (*MANY, *DOCTOR)  # the commands that care how many requests are answered at once


def option(
    default: Any, kind: Kind, *other: str, zh: str, en: str, env: str = "", commands: Iterable[str] = COMMANDS
) -> Any:
    """A row: ``other`` spellings beside --name, ``env`` instead of CHATGLM_<NAME>, the ``commands`` that take it.

    Default None: decided at start.
    """
    row = {"kind": kind, "other": other, "zh": zh, "en": en, "env": env, "commands": commands}
    return dataclasses.field(default=default, metadata=row)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the user asked for; None is left to the launch profile (or, for ``config``, means that there is no file)."""

    model: str | None = option(None, MODEL,
        zh="模型：THUDM 里的名字或一个文件夹；demo 是自带的小模型；auto 即 THUDM/chatglm2-6b，"
        "要下载而只用 4 位运行时是它的 int4 版",
        en="model: a name under THUDM or a folder; demo is the small one that comes along; auto is THUDM/chatglm2-6b, "
        "or its int4 edition where it would be downloaded to run in 4 bits")
    family: str = option("auto", choice("auto", "chatglm", "chatglm2", "chatglm3", "codegeex2"),
        zh="模型是哪一代：chatglm 即 ChatGLM-6B，chatglm2 即 ChatGLM2-6B，chatglm3 即 ChatGLM3-6B，"
        "codegeex2 即 CodeGeeX2-6B；auto 看模型文件夹",
        en="the model's generation: chatglm means ChatGLM-6B, chatglm2 ChatGLM2-6B, chatglm3 ChatGLM3-6B, codegeex2 "
        "CodeGeeX2-6B; auto looks at its folder", commands=RUNNING)
    ptuning: Path | None = option(None, FOLDER,  # noqa: RUF009
        zh="P-Tuning v2 训练出的 checkpoint 文件夹，放在模型前面",
        en="folder of a P-Tuning v2 checkpoint, which goes in front of the model", commands=RUNNING)
    lora: Path | None = option(None, FOLDER,  # noqa: RUF009
        zh="LoRA 文件夹（PEFT 格式，有 adapter_config.json），加载时合并进模型",
        en="folder of a LoRA adapter (PEFT, with adapter_config.json), merged into the model when it is loaded",
        commands=RUNNING)
    host: str = option("127.0.0.1", HOST, "-H",
        zh="监听地址；0.0.0.0 让局域网里的机器也能访问",
        en="address to listen on; 0.0.0.0 lets other machines in", commands=WHERE)
    port: int = option(5178, integer(0, 65535), "-P",
        zh="端口；0 表示任选一个空闲的", en="port; 0 picks a free one", commands=WHERE)
    profile: str = option("auto", choice("auto", "small", "medium", "large", "cpu"),
        zh="档位：small 6 GB 显存、medium 10 GB、large 13 GB、cpu 不用显卡；auto 按空闲显存选",
        en="small needs 6 GB of GPU memory, medium 10, large 13, cpu none; auto goes by what is free")
    quantize: int | None = option(None, BITS, "-q",
        zh="权重的位数；0 即 16，不量化", en="bits per weight; 0 means 16, not quantized")
    device: str = option("auto", DEVICE, zh="在哪里计算；-1 即 cpu，0 即 cuda:0",
        en="where to compute; -1 means cpu, 0 means cuda:0")
    dtype: str = option("auto", choice("auto", "float32", "bfloat16", "float16"),
        zh="计算用的数值类型", en="number format to compute in", commands=RUNNING)
    max_length: int | None = option(None, integer(64, 131072, auto=True),
        zh="一次请求的提问加回答最多多少 token", en="most tokens of one request, prompt and answer", commands=RUNNING)
    slots: int | None = option(None, integer(1, 256, auto=True),
        zh="同时回答几个请求", en="requests answered at the same time", commands=SHARED)
    keep: int | None = option(None, integer(0, 256, auto=True),
        zh="另外最多保留几段答完的对话，接着问时不必重读，至多占余下内存的一半；auto：16 段以内，2 GiB 以内",
        en="finished conversations to keep besides, which then go on without being read again, in half of the memory "
        "that is left at most; auto: up to 16, up to 2 GiB", commands=SHARED)
    queue: int = option(32, integer(0, 1000),
        zh="最多几个请求排队等候，超出时回复“服务器忙”", en="requests that may wait; more are told to come back",
        commands=HTTP)
    prefill_chunk: int | None = option(None, integer(16, 8192, auto=True),
        zh="读提问时每步最多多少 token", en="tokens of a prompt read in one step", commands=RUNNING)
    speculate: int | None = option(None, integer(0, 15, auto=True),
        zh="每步最多预先猜几个 token（从上文里找，一步验证，回答不变）；auto 猜到划算为止，0 不猜",
        en="most tokens guessed ahead in a step, from the text so far; changes no answer; auto: what pays, 0: none",
        commands=RUNNING)
    threads: int = option(0, integer(0, 1024),
        zh="CPU 线程数；0 表示物理核数", en="CPU threads; 0 means one per physical core", commands=RUNNING)
    chat_log: Path | None = option(ROOT / "chatlog.log", LOG,  # noqa: RUF009
        zh="把问答记到这个文件；不想记就写 --chat-log none 或 --no-chat-log",
        en="file that keeps the chats; --chat-log none or --no-chat-log keeps nothing", commands=MANY)
    max_body: int = option(8, integer(1, 1024), zh="请求正文的上限，MiB", en="largest request body in MiB",
        commands=HTTP)
    cors: tuple[str, ...] = option(("*",), ORIGINS,
        zh="哪些网站的网页可以调用本服务", en="websites whose pages may call this server", commands=HTTP)
    glm_api_stream: str = option("cumulative", choice("cumulative", "delta"),
        zh="/chat-stream 的每个事件：cumulative 是到目前为止的全文（早期的 GLM-API），delta 只是新的字（后来的版本）",
        en="events of /chat-stream: all of the answer so far, as early GLM-API, or what is new, as later versions",
        commands=HTTP)
    browser: bool = option(False, FLAG,
        zh="就绪后打开网页（.bat 启动时默认打开）", en="open the page when ready (the .bat launchers do)",
        commands=HTTP)
    spool: Path | None = option(None, FOLDER, "--dir",  # noqa: RUF009
        zh="处理这个文件夹里的请求文件 requests/*.request（命令 spool 默认用当前文件夹；命令 serve 默认不处理）",
        en="folder with request files requests/*.request (spool: by default the current one; serve: none)",
        commands=("serve", "spool"))
    url: str = option("", SERVER,
        zh="与这个地址（http://主机:端口）上正在运行的服务对话，这里不加载模型",
        en="talk to the server that runs at http://HOST:PORT; no model is loaded here", commands=CHAT)
    prefix: str = option("", TEXT, zh="所有回答的开头", en="what every answer starts with", commands=CHAT)
    temperature: float = option(0.8, number(0, 2),
        zh="回答的随机程度；0 表示总取最可能的字", en="how random answers are; 0 always takes the likeliest token",
        commands=CHAT)
    top_p: float = option(0.8, number(0, 1),
        zh="只在概率合计达到这个值的候选里取", en="choose among the likeliest tokens of this probability together",
        commands=CHAT)
    json: bool = option(False, FLAG,
        zh="只输出 JSON（见 docs/doctor.md）", en="print JSON alone (see docs/doctor.md)", commands=DOCTOR)
    zip: bool = option(False, FLAG,
        zh="把结果打包成 zip，报告问题时附上；不含聊天内容、用户名和密钥",
        en="pack the results for a bug report, without chats, user name and keys", commands=DOCTOR)
    log_level: str = option("info", choice("debug", "info", "warning", "error"),
        zh="日志级别；chat 里默认是 warning", en="what to log; chat has warning for its default")
    language: str = option("auto", choice("auto", "zh", "en"), env="CHATGLM_LANG",
        zh="界面语言（auto 看系统）", en="language of the messages (auto asks the system)")
    config: Path | None = option(None, FILE,  # noqa: RUF009
        zh="TOML 配置文件；项目里如有 config.toml 就用它",
        en="TOML file with options; config.toml in the project if there")
    embedding_model: str = option("text2vec-large-chinese", NAME,
        zh="句向量模型：THUDM 里的名字或一个文件夹；第一次用到时才下载和加载",
        en="sentence model for embeddings: a name under THUDM or a folder; downloaded and loaded on first use",
        commands=HTTP)
    source: tuple[str, ...] | None = option(None, SOURCES,
        zh="从哪里下载模型：modelscope、hf-mirror、huggingface 里的一个或几个（逗号隔开），或自己的镜像的网址；"
        "auto 测速后用最快的，断了换下一个",
        en="where models come from: one or more of modelscope, hf-mirror, huggingface, separated by commas, or the "
        "address of a mirror of your own; auto measures them and takes the fastest, and the next one where it fails")
    endpoint: str | None = option(None, URL, env="HF_ENDPOINT",
        zh="只从这个 Hugging Face 镜像下载，例如 https://hf-mirror.com；auto 见 --source",
        en="download from this Hugging Face mirror alone, e.g. https://hf-mirror.com; auto: see --source")
    verify: bool = option(False, FLAG,
        zh="只核对已有的文件（大小和 SHA-256），不下载；有问题时退出码是 1",
        en="only check the files that are there (size and SHA-256), download nothing; exit code 1 if any is wrong",
        commands=DOWNLOAD)
    prune: bool = option(False, FLAG,
        zh="下载后转换成这台电脑用的格式，核对无误后删掉原来的权重文件，腾出磁盘",
        en="after the download convert the weights to what this machine uses, check that, and delete their originals",
        commands=DOWNLOAD)


ROWS = {row.name: row for row in dataclasses.fields(Config)}
