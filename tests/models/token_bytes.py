"""What holds for ``Tokenizer.token_bytes`` of every family."""

TEXTS = [
    "",
    "你好，world",
    " 两个  空格\n\n\t制表 ",
    "👋🏽 𠮷 é",
    "[gMASK] <|user|> <n> <0x41>",
    "\r\n12345",
    "a" * 100,
    " " * 200,
]


def check_token_bytes(tokenizer):
    """Every id between two words, as ``decode`` shows it there."""
    word = tokenizer.encode("x")
    ids = [*range(-2, tokenizer.vocab_size + 2), 10**9]
    for i in ids:
        data = b"".join(map(tokenizer.token_bytes, [*word, i, *word]))
        assert data.removeprefix(b" ").decode("utf-8", "replace") == tokenizer.decode([*word, i, *word]), i


def check_joined_bytes(tokenizer, text):
    data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert data.removeprefix(b" ").decode() == tokenizer.decode(tokenizer.encode(text))
    return data
