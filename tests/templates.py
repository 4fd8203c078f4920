"""Chat templates of the shapes that real models have, written small; and tokenizers with their special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorafit.data.rows import IGNORED

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# thoughts of the answers after the last question only, an empty one for the last; tools and their results
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content or '' %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    '{% for c in m.tool_calls or [] %}{% set c = c.function or c %}{{ \'\n<tool_call>\n{"name": "\' + c.name + \'", "arguments": \' }}'
    "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (  # a date, trimmed contents, end tokens that no list of the tokenizer holds
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (  # no system turn, another name for the assistant
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL3 = (  # the system turn and the tools go with the last question; calls as a list
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if system is defined and loop.index0 == ns.last %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
GPT_OSS = (  # channels; an earlier answer ends otherwise than the last
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
R1 = (  # every thought is cut, and the prompt opens one
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
MARKED = (  # says itself what the assistant's part is
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {  # name: template, special tokens, eos, what ends a turn
    "chatml": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", "<|im_end|>"),
    "qwen3": (QWEN3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", "<|im_end|>"),
    "llama3": (LLAMA3, ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eos|>"), "<|eos|>", "<|eot_id|>"),
    "gemma": (GEMMA, ("<|begin|>", "<start_of_turn>", "<end_of_turn>", "<eos>"), "<eos>", "<end_of_turn>"),
    "mistral3": (MISTRAL3, ("<|begin|>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", "</s>"),
    "gpt-oss": (GPT_OSS, ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), "<|endoftext|>", "<|return|>"),
    "r1": (R1, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|eos|>"), "<|eos|>", "<|eos|>"),
    "marked": (MARKED, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", "<|im_end|>"),
}  # fmt: skip


def bpe(specials: tuple[str, ...], eos: str, template: str | None = None, listed: bool = False):
    """A byte-level tokenizer; unless `listed`, its special tokens stand in no list of the configuration."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = "user assistant system tool Where is Ada? In the barn. And Ben? At the market. \n\n"
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([words] * 4, trainer)
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    more = {"additional_special_tokens": [s for s in specials if s != eos]} if listed else {}
    begin = {"bos_token": "<|begin|>"} if "<|begin|>" in specials else {}
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, **begin, **more)
    tok.chat_template = template
    return tok


def shaped(name: str):
    """(a tokenizer with the template of that shape, what ends a turn)."""
    template, specials, eos, end = SHAPES[name]
    return bpe(specials, eos, template), end


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def spans(tokenizer, row):
    """The learned texts, one for each run of labels."""
    runs, run = [], []
    for label in (*row.labels, IGNORED):
        if label == IGNORED and run:
            runs.append(tokenizer.decode(run))
            run = []
        elif label != IGNORED:
            run.append(label)
    return runs


CHATS = {
    "one": [turn("user", "Where is Ada?"), turn("assistant", "In the barn.")],
    "two": [turn("user", "Where is Ada?"), turn("assistant", "In the barn."), turn("user", "And Ben?"), turn("assistant", "At the market.")],
    "short": [turn("user", "A or B?"), turn("assistant", "A"), turn("user", "a"), turn("assistant", "a")],
    "alike": [turn("user", "yes"), turn("assistant", "yes"), turn("user", "yes"), turn("assistant", "yes")],
    "names a role": [turn("user", "Say user."), turn("assistant", "user"), turn("user", "Say final."), turn("assistant", "final")],
}  # fmt: skip
