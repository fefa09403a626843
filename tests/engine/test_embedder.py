import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import BertModel, ElectraConfig, ElectraModel, RobertaConfig, RobertaModel

from server.core import Embeddings
from server.engine.embedder import BATCH_TOKENS, Embedder, SentenceModel, batches
from server.errors import GenerationFailed, Overloaded, StartupError, Unavailable
from tests.conftest import ROOT
from tests.functional.live import wait_for
from tests.sentence_models import CHINESE, VOCABULARY, make_bert, pickle_weights, plain_vectors, real_model

TEXTS = [
    "你好",
    "",
    "hello world",
    CHINESE[:300],
    "一",
    "hello, 世界! \n\t 丁丂七丄 🙂 unknown",
    " ",
    CHINESE[:254],
    CHINESE[:255],
    "helloing world " * 200,
    *(CHINESE[start : start + (1, 3, 40, 120)[start % 4]] for start in range(60)),
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@contextmanager
def running(folder, **options):
    embedder = Embedder("tiny", folder if callable(folder) else lambda: folder, **options)
    try:
        yield embedder
    finally:
        embedder.close()


def assert_same(found: Embeddings, folder, texts, **options) -> None:
    wanted, count = plain_vectors(folder, texts, **options)
    assert found.prompt_tokens == count
    assert all(vector.typecode == "f" for vector in found.vectors)
    torch.testing.assert_close(torch.tensor(list(map(list, found.vectors))), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
        {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 2, "max_position_embeddings": 256},
    ],
)
def test_vectors_are_those_of_plain_transformers(sizes, tmp_path):
    folder = make_bert(tmp_path, **sizes)
    with running(folder) as embedder:
        found = embedder.embed(TEXTS)
        assert len(found.vectors[0]) == sizes["hidden_size"]
        assert_same(found, folder, TEXTS)
        for text in TEXTS[:4]:
            assert_same(embedder.embed([text]), folder, [text])
        assert embedder.embed([]) == Embeddings((), 0)


@pytest.mark.parametrize(("config", "network"), [(RobertaConfig, RobertaModel), (ElectraConfig, ElectraModel)])
def test_other_models_that_are_like_bert(config, network, tmp_path):
    folder = make_bert(tmp_path, config, network, pad_token_id=0)
    with running(folder) as embedder:
        assert_same(embedder.embed(TEXTS), folder, TEXTS)


def test_weights_in_half_precision_are_computed_with_in_single(tmp_path):
    folder = make_bert(tmp_path)
    BertModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    with running(folder) as embedder:
        assert_same(embedder.embed(TEXTS), folder, TEXTS)


def test_a_model_of_fewer_positions_cuts_earlier(tmp_path):
    folder = make_bert(tmp_path, max_position_embeddings=64)
    with running(folder) as embedder:
        assert_same(embedder.embed(TEXTS), folder, TEXTS, max_length=64)


def test_weights_in_a_pickle_and_no_pooler(tmp_path):
    folder = pickle_weights(make_bert(tmp_path))
    with running(folder) as embedder:
        assert_same(embedder.embed(TEXTS), folder, TEXTS)


def test_the_real_model():
    texts = ["", "A cat sits on the mat.", "今天天气很好", "The weather is fine today. " * 60]
    texts += ["word " * count for count in range(40)]
    with running(real_model()) as embedder:
        assert_same(embedder.embed(texts), real_model(), texts)


def test_sentences_that_mean_the_same_are_near():
    pairs = [
        ("How do I reset my password?", "I forgot my password, how can I change it?"),
        ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
        ("Stocks fell sharply on Monday.", "Share prices dropped at the start of the week."),
    ]
    with running(real_model()) as embedder:
        vectors = torch.tensor([list(v) for v in embedder.embed([text for pair in pairs for text in pair]).vectors])
    similar = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    for row in range(0, len(vectors), 2):
        others = [column for column in range(len(vectors)) if column // 2 != row // 2]
        assert similar[row, row + 1] > similar[row, others].max() + 0.2


@pytest.mark.parametrize(
    "text",
    [
        CHINESE * 100,
        " " * 30_000 + "hello",
        " " * 5000 + CHINESE + " " * 90_000 + "hello",
        "a" * 4090 + " hello " * 20_000,
        "hello" * 3000 + CHINESE * 3,
        "helloing " * 9000,
    ],
    ids=["chinese", "blank", "blanks between", "cut in a word", "endless word", "english"],
)
def test_of_a_long_text_only_the_beginning_is_tokenized_and_nothing_changes(text, bert):
    with running(bert) as embedder:
        assert_same(embedder.embed([text, "你好"]), bert, [text, "你好"])


def test_half_a_surrogate_pair(bert):
    with running(bert) as embedder:
        assert len(embedder.embed(["丁\ud83d丂"]).vectors) == 1


def test_batches_hold_every_text_once_and_little_padding():
    lengths = [(2, 256, 17, 90, 3, 700, 40)[i % 7] for i in range(500)]
    groups = list(batches(lengths))
    assert sorted(itertools.chain(*groups)) == list(range(500))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= BATCH_TOKENS
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded < 1.05 * sum(lengths)


def test_requests_at_once_get_their_own_vectors_and_load_once(bert):
    loads = []

    def find():
        loads.append(1)
        return bert

    lists = [TEXTS[start::7] for start in range(7)] * 2
    with running(find) as embedder, ThreadPoolExecutor(len(lists)) as pool:
        for texts, found in zip(lists, pool.map(embedder.embed, lists), strict=True):
            assert_same(found, bert, texts)
    assert len(loads) == 1


def test_a_short_request_does_not_wait_for_a_long_list():
    ended, texts = [], ["word " * 300] * 40
    with running(real_model()) as embedder:
        embedder.embed(["load it"])
        long = threading.Thread(target=lambda: (embedder.embed(texts), ended.append("long")))
        long.start()
        for _ in range(3):
            embedder.embed(["hello"])
            ended.append("short")
        long.join()
    assert ended == ["short"] * 3 + ["long"]


def test_nothing_more_is_computed_for_a_client_that_has_left(bert):
    asked = []
    with running(lambda: bert) as embedder:
        with pytest.raises(GenerationFailed):
            embedder.embed(["word " * 300] * 9, lambda: bool(asked.append(1)) or len(asked) > 3)
        assert len(asked) == 4
        assert_same(embedder.embed(TEXTS), bert, TEXTS)


def test_clients_that_leave_while_it_loads_give_their_places_back(bert):
    go, left = threading.Event(), threading.Event()

    def find():
        assert go.wait(20)
        return bert

    with running(find, capacity=2) as embedder, ThreadPoolExecutor(3) as pool:
        leaving = [pool.submit(embedder.embed, ["a"], left.is_set) for _ in range(2)]
        while embedder._room.acquire(blocking=False):
            embedder._room.release()
        left.set()
        for future in leaving:
            with pytest.raises(GenerationFailed):
                future.result(20)
        staying = pool.submit(embedder.embed, TEXTS)
        go.set()
        assert_same(staying.result(20), bert, TEXTS)


def test_the_threads_of_others_keep_their_number(bert):
    def count_in_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with running(bert, threads=2) as embedder:
            embedder.embed(TEXTS)
            assert embedder._run(torch.get_num_threads) == 2
            assert (torch.get_num_threads(), count_in_a_new_thread()) == (5, 5)
    finally:
        torch.set_num_threads(before)


# what goes wrong


def test_without_a_model_it_says_where_one_belongs_and_tries_again(bert):
    answers = [StartupError("缺少文件，请放进 /m。", "Files are missing, put them into /m."), bert]

    def find():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with running(find) as embedder:
        with pytest.raises(Unavailable) as caught:
            embedder.embed(["你好"])
        assert "put them into /m. Or" in caught.value.en and "请放进 /m。也" in caught.value.zh
        assert "--embedding-model" in caught.value.en and "--embedding-model" in caught.value.zh
        assert_same(embedder.embed(["你好"]), bert, ["你好"])


def test_requests_that_wait_for_a_load_share_its_failure():
    started, go, loads = threading.Event(), threading.Event(), []

    def find():
        loads.append(1)
        started.set()
        go.wait(20)
        raise StartupError("没有。", "None.")

    with running(find) as embedder, ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(embedder.embed, ["你好"]) for _ in range(5)]
        assert started.wait(20)
        wait_for(lambda: embedder._room._value == 16 - 5)
        go.set()
        assert all(isinstance(future.exception(20), Unavailable) for future in waiting)
    assert len(loads) == 1


def remove_a_tensor(folder):
    network = BertModel.from_pretrained(folder)
    weights = dict(network.state_dict())
    del weights["encoder.layer.1.output.dense.weight"]
    network.save_pretrained(folder, state_dict=weights)


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_a_tensor, "encoder.layer.1.output.dense.weight"),
        (cut_the_weights, "SafetensorError"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "chatglm"}'), "chatglm"),
    ],
    ids=["tensor", "weights", "json", "type"],
)
def test_a_folder_that_cannot_be_loaded(damage, said, tmp_path):
    damage(make_bert(tmp_path))
    with running(tmp_path) as embedder:
        with pytest.raises(Unavailable) as caught:
            embedder.embed(["你好"])
        assert str(tmp_path) in caught.value.zh and str(tmp_path) in caught.value.en
        assert said in caught.value.en and "\n" not in caught.value.en
        make_bert(tmp_path)
        assert_same(embedder.embed(["你好"]), tmp_path, ["你好"])


def test_a_language_model_is_no_sentence_model():
    with running(ROOT / "THUDM" / "demo") as embedder, pytest.raises(Unavailable, match="demo"):
        embedder.embed(["你好"])


def test_a_request_that_fails_fails_alone(tmp_path):
    """The network has one row too few: the last word of the vocabulary has no embedding."""
    folder = make_bert(tmp_path, vocab_size=len(VOCABULARY) - 1)
    with running(folder) as embedder, ThreadPoolExecutor(2) as pool:
        good = pool.submit(embedder.embed, TEXTS[:9] * 6)
        with pytest.raises(GenerationFailed):
            embedder.embed(["you", "helloing"])
        assert_same(good.result(), folder, TEXTS[:9] * 6)
        assert_same(embedder.embed(["you"]), folder, ["you"])


def test_too_many_requests_are_told_so_and_closing_frees_those_that_wait(bert):
    started, go = threading.Event(), threading.Event()

    def find():
        started.set()
        go.wait(20)
        return bert

    with running(find, capacity=2) as embedder, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(embedder.embed, ["你好"]) for _ in range(2)]
        assert started.wait(20)
        wait_for(lambda: not embedder._room._value)
        with pytest.raises(Overloaded, match="still being downloaded or loaded"):
            embedder.embed(["你好"])
        embedder.close(timeout=0)
        assert all(isinstance(future.exception(20), Overloaded) for future in waiting)
        with pytest.raises(Overloaded, match="shutting down"):
            embedder.embed(["你好"])
        go.set()


def test_closing_ends_what_is_being_computed():
    with running(real_model()) as embedder, ThreadPoolExecutor(1) as pool:
        embedder.embed(["load it"])
        long = pool.submit(embedder.embed, ["word " * 300] * 2000)
        wait_for(lambda: embedder._room._value == 15)
        embedder.close(timeout=20)
        assert not embedder._thread.is_alive()
        assert isinstance(long.exception(20), Overloaded)


def test_closing_does_not_wait_for_the_batch(bert):
    closed = Future()
    model = SentenceModel(bert, closed)
    tokens = model.tokenize(TEXTS)
    closed.set_result(None)
    with pytest.raises(Overloaded):
        model.encode(tokens)
