"""Texts of the demo model: reading tools/demo_texts and turning them into training sequences.

Imported by train_demo.py, demo_report.py and tests/test_demo_texts.py; needs neither torch nor a trained tokenizer.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

TEXTS = Path(__file__).parent / "demo_texts"
FALLBACK = "fallback.txt"
QUESTION, ANSWER, WORDS = ("问：", "Q:"), ("答：", "A:"), ("换：", "with:")
EARLIER_DIALOGUES = (0,) * 13 + (1, 1, 1, 2, 2, 3, 4)
PLAIN, CUT = 0.5, 0.3  # shares of answers without a prefix and with one of their own; the rest has a foreign one
SHORTENED, SHORT = 0.7, 10  # share of answers of which only this many pieces are learned, to see more of them
NEWLINE_IDS = 2  # "\n" in front of a text is the dummy space and the byte 0x0A

IGNORED = -100  # label of a position without loss, as torch's cross_entropy has it
SHORT_QUESTION = 9  # characters
CLAUSE_END = re.compile("[，。：；！]|[,.:;!] ")
SYNONYMS = [(re.compile(pattern), choices) for pattern, choices in (
    ("怎么(?!样)|怎样|如何", ("怎么", "怎样", "如何", "咋")),
    ("是什么", ("是什么", "是啥", "是什么东西")),
    ("有什么用|是干什么的", ("有什么用", "是干什么的", "干嘛用的", "的用途是什么")),
    ("在哪里", ("在哪里", "在哪儿", "在哪")),
    ("可以|能(?!力)", ("可以", "能", "能不能")),
    ("给我|为我", ("给我", "帮我", "为我")),
    ("什么是", ("什么是", "什么叫", "请问什么是")),
    ("需要|要(?!求)", ("需要", "要", "得要")),
    (r"\bhow (do|can) I\b", ("how do I", "how can I", "how to", "how do you", "how should I")),
    (r"\bwhat is\b", ("what is", "what's", "whats", "what exactly is")),
    (r"\btell me about\b", ("tell me about", "explain", "describe")),
    (r"\bI am\b", ("I am", "I'm", "i am")),
    (r"\bdo not\b|\bdon't\b", ("do not", "don't", "dont")),
    (r"\bthe\b", ("the", "the", "the", "")),
)]
SMALL_WORDS = re.compile(r"[\u4e00-\u9fff]|\b(?:a|an|the|is|are|do|does|can|it|for|of|to|in|my|me)\b ?")
POLITE = (("请问", "请问一下，", "你好，", "麻烦问一下，", "我想知道", "能告诉我", "那"),
          ("谢谢", "，谢谢", "呢", "啊", "呀"))
POLITE_EN = (("please, ", "hi, ", "hello, ", "excuse me, ", "so ", "can you tell me ", "I want to know ", "ok, "),
             (" please", ", please", " thanks", " then", " now"))


@dataclass(frozen=True)
class Round:
    """One exchange: all wordings of the question, and its answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Entry:
    """One block of a text file: its dialogues, one per line of filled-in words (a single one without `with:`)."""

    source: str
    dialogues: tuple[tuple[Round, ...], ...]

    @property
    def weight(self) -> float:
        """How often the entry is drawn: more with many words, wordings or rounds, but far from in proportion; and
        more with short questions, which look much alike to the model."""
        first, *later = self.dialogues[0]
        variety = len(self.dialogues) ** 0.4 * (min(len(first.questions), 16) / 8) ** 0.5 * (1 + 0.3 * len(later))
        short = sum(map(len, first.questions)) < SHORT_QUESTION * len(first.questions)
        return variety * (1.5 if short and self.source != FALLBACK else 1.0)


def is_chinese(text: str) -> bool:
    """True if the text holds a CJK ideograph."""
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def _lines(path: Path) -> list[str]:
    return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _after(line: str, marks: tuple[str, ...]) -> str | None:
    return next((line[len(mark):].strip() for mark in marks if line.startswith(mark)), None)


def _parse_block(source: str, lines: list[str]) -> Entry:
    rounds: list[tuple[list[str], list[str]]] = []
    words: list[list[str]] = [[]]
    for line in lines:
        if (question := _after(line, QUESTION)) is not None:
            if not rounds or rounds[-1][1]:
                rounds.append(([], []))
            rounds[-1][0].extend(question.split(" | "))
        elif (answer := _after(line, ANSWER)) is not None and rounds and not rounds[-1][1]:
            rounds[-1][1].append(answer)
        elif (filling := _after(line, WORDS)) is not None:
            words = [group.split(",") for group in filling.split(" | ")]
        elif line.startswith("  ") and rounds and rounds[-1][1]:
            rounds[-1][1].append(line.strip())
        else:
            raise ValueError(f"{source}: cannot read the line {line!r}")
    if not rounds or not rounds[-1][1]:
        raise ValueError(f"{source}: an entry without an answer: {lines[0]!r}")
    return Entry(source, tuple(
        tuple(Round(tuple(_fill(q, group) for q in qs), _fill("\n".join(answer), group)) for qs, answer in rounds)
        for group in words))


def _fill(text: str, words: list[str]) -> str:
    for number, word in enumerate(words, 1):
        text = text.replace(f"{{{number}}}", word)
    return text


def load_entries(folder: Path = TEXTS) -> list[Entry]:
    """All entries of zh.txt, en.txt and fallback.txt, in the files' order."""
    entries = []
    for name in ("zh.txt", "en.txt", FALLBACK):
        block: list[str] = []
        for line in [*_lines(folder / name), ""]:
            if line:
                block.append(line)
            elif block:
                entries.append(_parse_block(name, block))
                block = []
    return entries


def load_openers(folder: Path = TEXTS) -> list[str]:
    """Foreign beginnings of answers; the Latin ones end with a space, which editors like to strip from files."""
    return [line if is_chinese(line) else line + " " for line in _lines(folder / "openers.txt") if line]


def load_characters(folder: Path = TEXTS) -> str:
    """Common characters that the vocabulary covers beside those of the texts."""
    return "".join(_lines(folder / "characters.txt"))


def all_texts(entries: list[Entry]) -> list[str]:
    """Every question and answer once, in order."""
    texts = (text for entry in entries for dialogue in entry.dialogues for turn in dialogue
             for text in (*turn.questions, turn.answer))
    return list(dict.fromkeys(texts))


def tokenizer_texts(entries: list[Entry]) -> list[str]:
    """Texts that the tokenizer counts its merges in: one wording for each group of filled-in words, so that
    templates do not outweigh the rest."""
    texts = []
    for entry in entries:
        for index, dialogue in enumerate(entry.dialogues):
            for turn in dialogue:
                filled = index > 0 or entry.source == FALLBACK
                questions = (turn.questions[index % len(turn.questions)],) if filled else turn.questions
                texts += [*questions, turn.answer]
    plain = (text.replace("{汉字}", "").replace("{letters}", "") for text in dict.fromkeys(texts))
    return [line for text in plain for line in text.split("\n")]


def normalized(question: str) -> str:
    """The question without punctuation, spaces and case, to find duplicates."""
    return re.sub(r"[\W_]+", "", question).lower() or question.strip()


def hold_out(entries: list[Entry]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Take a random wording from every third entry with at least four; words like "hi" resemble nothing and stay.

    Returns the entries to train on and the (question, answer) pairs held out.
    """
    kept, held, rng = [], [], random.Random(1)
    for index, entry in enumerate(entries):
        first = entry.dialogues[0][0]
        if index % 3 == 0 and len(first.questions) >= 4 and entry.source != FALLBACK:
            out = rng.choice([i for i, question in enumerate(first.questions) if len(question) > 3])
            held.append((first.questions[out], first.answer))
            entry = Entry(entry.source, tuple(
                (Round(turn.questions[:out] + turn.questions[out + 1:], turn.answer), *later)
                for turn, *later in entry.dialogues))
        kept.append(entry)
    return kept, held


def build_prompt(history: list[tuple[str, str]], question: str) -> str:
    """ChatGLM2's prompt text for a question after earlier (question, answer) rounds."""
    rounds = [f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1)]
    return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："


def fill_random(question: str, characters: str, rng: random.Random) -> str:
    """Replace {汉字} and {letters} by random characters."""
    while "{汉字}" in question:
        question = question.replace("{汉字}", "".join(rng.choices(characters, k=rng.randint(2, 6))), 1)
    while "{letters}" in question:
        letters = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", weights=range(27, 1, -1), k=rng.randint(4, 9)))
        question = question.replace("{letters}", letters, 1)
    return question


def _with_a_slip(question: str, rng: random.Random) -> str:
    """The question without one of its small words, or without one Chinese character."""
    places = list(SMALL_WORDS.finditer(question))
    if len(question) < 7 or not places:
        return question
    place = rng.choice(places)
    return question[:place.start()] + question[place.end():]


def vary(question: str, rng: random.Random) -> str:
    """The question as another person may type it: synonyms, politeness, punctuation, case, spaces, a slip."""
    chinese = is_chinese(question)
    for pattern, choices in SYNONYMS:
        if rng.random() < 0.2:
            question = pattern.sub(rng.choice(choices), question, count=1)
    before, after = POLITE if chinese else POLITE_EN
    if len(question) > 5 and rng.random() < 0.15:
        question = rng.choice(before) + question
    if len(question) > 5 and rng.random() < 0.08:
        question += rng.choice(after)
    if rng.random() < 0.1:
        question = _with_a_slip(question, rng)
    if rng.random() < 0.5 and question[-1:].isalnum():
        question += rng.choice("？？？?。！" if chinese else "???.!")
    if chinese and rng.random() < 0.15:
        question = question.replace(" ", "")
    case = rng.random()
    if case < 0.45:
        return question[:1].upper() + question[1:]
    return question.lower() if case < 0.6 else question


class SequenceMaker:
    """Draws training sequences; one seed gives one stream of them."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor, entries: list[Entry], openers: list[str],
                 characters: str, seed: int) -> None:
        self.sp = sp
        self.entries = entries
        self.weights = [entry.weight for entry in entries]
        self.openers = {flag: [text for text in openers if is_chinese(text) == flag] for flag in (True, False)}
        self.characters = characters
        self.rng = random.Random(seed)
        self.head = [sp.get_piece_size() + 1, sp.get_piece_size() + 3]  # [gMASK] sop

    def draw(self) -> tuple[list[int], list[int]]:
        """One sequence: ids and labels of the same length, labels IGNORED outside the answers."""
        history, (question, answer) = self._conversation()
        prompt = build_prompt(history, question)
        form = self.rng.random()
        if form < PLAIN:
            opening, own, target = "", "", self.sp.encode(answer)
        else:
            opening, own, rest = ("", *self._cut(answer)) if form < PLAIN + CUT else self._opened(answer)
            target = self.continuation(rest)
        ids, labels = self._prompt_ids(prompt + opening, own, history)
        target = [*target, self.sp.eos_id()]
        if self.rng.random() < SHORTENED:
            target = target[:SHORT]
        return ids + target, labels + target

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that continues another one, so without the dummy space in front."""
        return self.sp.encode("\n" + text)[NEWLINE_IDS:]

    def _conversation(self) -> tuple[list[tuple[str, str]], tuple[str, str]]:
        """Earlier rounds and the last one, as (question, answer); questions as people would type them."""
        rounds = self._dialogue()
        earlier: list[tuple[str, str]] = []
        for _ in range(self.rng.choice(EARLIER_DIALOGUES)):
            earlier += self._dialogue(unless_followed_by=normalized(rounds[0][0]))
        *history, last = [(vary(question, self.rng), answer) for question, answer in earlier + rounds]
        return history, last

    def _dialogue(self, unless_followed_by: str = "") -> list[tuple[str, str]]:
        """The first round of a random dialogue and some of the later ones, as (question, answer).

        A dialogue in which the question `unless_followed_by` is a later round would give it another meaning.
        """
        while True:
            entry = self.rng.choices(self.entries, self.weights)[0]
            first, *later = self.rng.choice(entry.dialogues)
            if all(unless_followed_by != normalized(q) for turn in later for q in turn.questions):
                break
        chosen = sorted(self.rng.sample(range(len(later)), self.rng.randint(0, len(later))))
        rounds = [first, *(later[i] for i in chosen)]
        return [(fill_random(self.rng.choice(turn.questions), self.characters, self.rng), turn.answer)
                for turn in rounds]

    def _cut(self, answer: str) -> tuple[str, str]:
        """The answer in two: at the end of a clause or anywhere."""
        clauses = [match.end() for match in CLAUSE_END.finditer(answer)]
        at = self.rng.choice(clauses) if clauses and self.rng.random() < 0.3 else self.rng.randint(1, len(answer))
        return answer[:at], answer[at:]

    def _opened(self, answer: str) -> tuple[str, str, str]:
        """A foreign opening (sometimes without its punctuation), sometimes some of the answer, and the rest."""
        opener = fill_random(self.rng.choice(self.openers[is_chinese(answer)]), self.characters, self.rng)
        form = self.rng.random()
        if form < 0.2:
            bare = opener.rstrip(" ，。！：～,.!:")
            return bare, "", opener[len(bare):] + answer
        if form < 0.4:
            return opener, *self._cut(answer)
        if form < 0.6 and opener.endswith(" "):
            return opener[:-1], "", " " + answer
        return opener, "", answer

    def _prompt_ids(self, text: str, own: str, history: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of the prompt `text` and the beginning `own` of the answer; labels for `own` and the answers in the
        history, which makes long prompts worth their time.

        Their first piece has none, because at run time an answer begins with the dummy space; nor has the last one
        of `own`, which may end inside a word.
        """
        spans = [(len(text.encode()), len((text + own).encode()) - 1)]
        for number, (_, answer) in enumerate(history):
            start = len(build_prompt(history[:number], history[number][0]).encode())
            spans.append((start, start + len(answer.encode())))
        ids, labels, end = list(self.head), [IGNORED] * len(self.head), -1  # the dummy space is not in the text
        for piece in self.sp.encode(text + own):
            begin, end = end, end + self._bytes(piece)
            inside = any(start < begin and end <= stop for start, stop in spans)
            ids.append(piece)
            labels.append(piece if inside else IGNORED)
        return ids, labels

    def _bytes(self, piece: int) -> int:
        """How many bytes of UTF-8 text a piece stands for."""
        return 1 if self.sp.is_byte(piece) else len(self.sp.id_to_piece(piece).replace("▁", " ").encode())
