"""``--ptuning`` and ``--lora`` of the real program: its answers are those of peft's model with the official prefix."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from server.core import Message
from server.models.chatglm2.prompt import ChatGLM2
from tests.conftest import ROOT
from tests.functional.program import Program
from tools.plain_networks import plain_network

DEMO = ROOT / "THUDM" / "demo"
CONFIG = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
TUNED = {"pre_seq_len": 6, "prefix_projection": True}
PREFIX = "transformer.prefix_encoder."
TOKENS = 16


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A P-tuning and a LoRA folder for the demo model, and the network with both."""
    folder = tmp_path_factory.mktemp("训练 结果")
    torch.manual_seed(3)
    network = plain_network({**CONFIG, **TUNED}, "chatglm2")
    prefix = {n: torch.randn_like(t) * 0.2 for n, t in network.state_dict().items() if n.startswith(PREFIX)}
    weights = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    network.load_state_dict({**weights, **prefix})
    (folder / "checkpoint-20").mkdir()
    torch.save(prefix, folder / "checkpoint-20" / "pytorch_model.bin")
    (folder / "checkpoint-20" / "config.json").write_text(json.dumps({**CONFIG, **TUNED}), encoding="utf-8")
    adapted = get_peft_model(network, LoraConfig(target_modules=["query_key_value", "dense_4h_to_h"], r=4)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder / "lora")
    return folder / "checkpoint-20", folder / "lora", adapted


def prompt(question):
    family = ChatGLM2()
    return family.build_prompt(family.load_tokenizer(DEMO), [Message("user", question)])


@torch.inference_mode()
def greedy(network, ids):
    ids, start = list(ids), len(ids)
    while len(ids) < start + TOKENS and ids[-1] != CONFIG["eos_token_id"]:
        ids.append(int(network(torch.tensor(ids))[-1].argmax()))
    return [i for i in ids[start:] if i != CONFIG["eos_token_id"]]


def ask(program, question):
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
    response = program.post("/v1/chat/completions", body)
    content = json.loads(response.read())
    assert response.status == 200, content
    return content["choices"][0]["message"]["content"]


@pytest.mark.filterwarnings("ignore")
def test_both_reach_the_engine(adapters):
    ptuning, lora, network = adapters
    family, tokenizer = ChatGLM2(), ChatGLM2().load_tokenizer(DEMO)
    with Program("--ptuning", str(ptuning), "--lora", str(lora)) as program:
        assert f"P-Tuning: {ptuning}" in program.text and f"LoRA: {lora}" in program.text
        assert "6 prefix tokens" in program.text and "8 matrices changed (rank 4)" in program.text
        answers = [ask(program, question) for question in ("你好", "hello")]
        connection = program.connect()
        connection.request("GET", "/v1/models")
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == "demo"
    plain = plain_network(CONFIG, "chatglm2")
    plain.load_state_dict({name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()})
    for question, answer in zip(("你好", "hello"), answers, strict=True):
        expected = greedy(network, prompt(question))
        assert answer == family.display(tokenizer.decode(expected), final=True) != ""
        assert expected != greedy(plain, prompt(question))


def test_what_is_missing_is_one_sentence(adapters):
    ptuning, _, _ = adapters
    with Program("--lora", str(ptuning), wait=False) as program:
        assert program.process.wait(30) == 2
    assert f"write --ptuning {ptuning}" in program.text and "Traceback" not in program.text


def test_adapter_of_another_model_is_one_sentence(adapters, tmp_path):
    _, lora, _ = adapters
    (tmp_path / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({name.replace("encoder.", ""): tensor for name, tensor in tensors.items()},
              tmp_path / "adapter_model.safetensors")
    with Program("--lora", str(tmp_path), wait=False) as program:
        assert program.process.wait(60) == 2
    assert "for which this model has no place" in program.text and "Traceback" not in program.text
