"""The address on record is one that a trusted proxy saw: no client chooses its own."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.context import client_address

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
CLIENT = "198.51.100.9"


def test_without_trusted_proxies_the_peer_is_the_client_whatever_it_claims() -> None:
    assert client_address(CLIENT, ["203.0.113.1", "10.0.0.1"], []) == CLIENT


def test_a_peer_that_is_no_proxy_is_not_believed() -> None:
    assert client_address(CLIENT, ["203.0.113.1"], PROXIES) == CLIENT


def test_behind_a_proxy_it_is_the_address_that_the_proxy_appended() -> None:
    assert client_address("10.0.0.1", [CLIENT], PROXIES) == CLIENT
    assert client_address("fd00::1", [" 2001:db8::7"], PROXIES) == "2001:db8::7"


@given(spoofed=st.lists(st.one_of(st.ip_addresses().map(str), st.text(max_size=20))))
def test_what_the_client_wrote_itself_never_counts(spoofed: list[str]) -> None:
    assert client_address("10.0.0.1", [*spoofed, CLIENT], PROXIES) == CLIENT
    assert client_address("10.0.0.1", [*spoofed, CLIENT, "10.9.9.9"], PROXIES) == CLIENT
    assert client_address(CLIENT, spoofed, PROXIES) == CLIENT


def test_only_proxies_on_the_way_leave_the_outermost_of_them() -> None:
    assert client_address("10.0.0.1", ["10.0.0.3", "10.0.0.2"], PROXIES) == "10.0.0.3"
    assert client_address("10.0.0.1", [], PROXIES) == "10.0.0.1"


@pytest.mark.parametrize("hop", ["unknown", "_hidden", "", "198.51.100.9:443", "[2001:db8::1]:1"])
def test_a_hop_that_is_no_address_ends_the_search_at_the_proxy_that_reported_it(hop: str) -> None:
    assert client_address("10.0.0.1", [CLIENT, hop], PROXIES) == "10.0.0.1"


@given(
    forwarded=st.lists(
        st.one_of(
            st.sampled_from(["10.1.2.3", CLIENT, "fe80::1%\0\n" + "x" * 99, "::ffff:10.0.0.1"]),
            st.text(max_size=20),
        )
    )
)
def test_what_goes_on_record_is_an_address_and_no_longer_than_one(forwarded: list[str]) -> None:
    address = client_address("10.0.0.1", forwarded, PROXIES)
    assert str(ip_address(address)) == address
    assert len(address) <= 45
    assert address.isprintable()


@pytest.mark.parametrize("peer", ["", "testclient", "/run/privyseal.sock"])
def test_a_peer_without_an_address_is_no_proxy(peer: str) -> None:
    assert client_address(peer, [CLIENT], PROXIES) == peer
