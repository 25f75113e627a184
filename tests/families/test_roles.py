"""Every token has its role, and image tokens are those that the model fills."""

import re

import pytest
import torch

from avar_lightning.data import SampleError
from avar_lightning.families import placeholder_ids
from avar_lightning.model import end_ids
from avar_lightning.roles import Role, tag_roles
from tests.families.conftest import ALL
from tests.families.matrix import WITHOUT_END
from tests.families.samples import KINDS, SYSTEM, sample

pytestmark = [pytest.mark.capability("roles"), pytest.mark.parametrize("family", ALL, indirect=True)]


def squeezed(text):
    return re.sub(r"\s+", " ", text).strip()


def said(family, encoded, role):
    """The text of a role's tokens without special tokens."""
    ids = encoded.tensors["input_ids"][0][encoded.tensors["role_ids"][0] == role]
    return squeezed(family.processor.tokenizer.decode(ids, skip_special_tokens=True))


def written(sample, role):
    parts = [
        part["text"]
        for message in sample.messages
        if message["role"] == role
        for part in ([{"text": message["content"]}] if isinstance(message["content"], str) else message["content"])
        if "text" in part
    ]
    return squeezed(" ".join(parts))


@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_the_parts_of_the_messages(family, kind):
    conversation = KINDS[kind]
    encoded = family.encode(conversation)
    # Words of an expanded image and of an end of turn that is no token are what a template adds to texts.
    added = r"<\\s>|<row_\d_col_\d>"
    answers = re.sub(added, "", said(family, encoded, Role.RESPONSE))
    assert squeezed(answers).replace(" ", "") == written(conversation, "assistant").replace(" ", "")
    assert said(family, encoded, Role.USER).replace(" ", "") == written(conversation, "user").replace(" ", "")
    system = said(family, encoded, Role.SYSTEM)
    assert SYSTEM in system
    assert written(conversation, "user")[:12] not in system
    labels, ids = encoded.tensors["labels"], encoded.tensors["input_ids"]
    assert labels.equal(ids.masked_fill(encoded.tensors["role_ids"] != Role.RESPONSE, -100))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_image_tokens_are_those_that_the_forward_fills(family, kind):
    model, encoded = family.model(), family.encode(KINDS[kind])
    inputs = dict(encoded.tensors)
    roles = inputs.pop("role_ids")
    seen = {}
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    if seen.get("inputs_embeds") is None:  # cross-attention: from an image's token on, the text sees it
        sees = inputs["cross_attention_mask"][0].any(-1).T if "cross_attention_mask" in inputs else []
        starts = [int(tokens.nonzero()[0]) for tokens in sees]
        assert (roles[0] == Role.IMAGE).nonzero().flatten().tolist() == starts
        return
    plain = model.get_input_embeddings()(inputs["input_ids"])
    filled = (seen["inputs_embeds"] != plain).any(-1)
    assert filled.equal(roles == Role.IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_roles_from_ids_alone_agree(family, kind):
    encoded = family.encode(KINDS[kind])
    tagged = tag_roles(encoded.tensors["input_ids"], family.processor)
    exact = encoded.tensors["role_ids"].clone()
    if (
        family.name == "Gemma 3"
    ):  # its system message stands inside the first user turn, and ids do not say where it ends
        exact[exact == Role.SYSTEM] = Role.USER
    assert tagged.equal(exact)


def test_an_answer_ends_where_generation_stops(family):
    tensors = family.encode(KINDS["one"]).tensors
    last = int(tensors["input_ids"][tensors["role_ids"] == Role.RESPONSE][-1])
    assert (last in end_ids(family.model(), family.processor)) == (family.name not in WITHOUT_END)


def test_a_typed_placeholder_is_refused(family):
    """It would become an image token without an image behind it, or a video."""
    model = family.model(from_scratch=True)
    for text in family.processor.tokenizer.convert_ids_to_tokens(placeholder_ids(model.config)):
        with pytest.raises(SampleError, match=re.escape(text)):
            family.encode(sample((40, 40), question=f"What is {text} in a text?"))
