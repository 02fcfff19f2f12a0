"""The golden vectors are data for implementations in any language; here they hold ours, in both directions."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

from dsi_protocol import MESSAGES, ProtocolError, decode, encode, prefix_checksum, vocabulary_hash
from dsi_protocol.gumbel import gumbel, half_log_table, log2_exponential, random_bits, stream_key
from support.vectors import as_json, cases, from_json, load


@pytest.mark.parametrize("case", cases("messages.json"))
def test_encode_gives_the_wire(case: dict[str, Any]) -> None:
    assert encode(from_json(case["message"])).hex() == case["wire"]


@pytest.mark.parametrize("case", cases("messages.json") + cases("tolerated.json"))
def test_decode_gives_the_message(case: dict[str, Any]) -> None:
    assert as_json(decode(bytes.fromhex(case["wire"]))) == case["message"]


@pytest.mark.parametrize("case", cases("must_reject.json"))
def test_bad_frames_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(bytes.fromhex(case["wire"]))
    assert type(caught.value).__name__ == case["error"]


def test_every_message_has_a_vector() -> None:
    names = {case["message"]["type"] for case in load("messages.json")["cases"]}
    assert names == {message.__name__ for message in MESSAGES}


def test_checksums() -> None:
    vectors = load("checksums.json")
    for case in vectors["prefix_checksum"]["cases"]:
        tokens = case["tokens"]
        assert prefix_checksum(tokens) == case["checksum"]
        half = len(tokens) // 2
        assert prefix_checksum(tokens[half:], prefix_checksum(tokens[:half])) == case["checksum"]
    for case in vectors["vocabulary_hash"]["cases"]:
        assert vocabulary_hash(case["vocabulary"]) == case["hash"]


def test_gumbel_noise() -> None:
    vectors = load("gumbel.json")
    table = half_log_table()
    assert vectors["table"]["length"] == len(table)
    assert (vectors["table"]["first"], vectors["table"]["last"]) == (list(table[:4]), list(table[-4:]))
    packed = struct.pack(f"<{len(table)}Q", *table)
    assert vectors["table"]["crc32_of_little_endian_u64"] == zlib.crc32(packed)
    for case in vectors["cases"]:
        seed, position, token = int(case["seed"]), case["position"], case["token"]
        bits = random_bits(stream_key(seed, position), token)
        assert f"{stream_key(seed, position):016x}" == case["key"]
        assert f"{bits:016x}" == case["bits"]
        assert log2_exponential(bits) == case["log2_exponential"]
        assert gumbel(seed, position, token).hex() == case["gumbel"]
    for edge in vectors["edges"]:
        assert log2_exponential(int(edge["bits"], 16)) == edge["log2_exponential"]
