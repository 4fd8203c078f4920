"""Whether the Hub is reached, also through a proxy."""

import socket

import pytest

from lorafit.model import network


@pytest.mark.parametrize(
    ("proxy", "place"),
    [
        ("proxy.corp:3128", ("proxy.corp", 3128)),
        ("http://proxy.corp:3128", ("proxy.corp", 3128)),
        ("https://proxy.corp", ("proxy.corp", 443)),
        ("", ("hub.example", 443)),
    ],
)
def test_a_proxy_with_or_without_its_scheme(monkeypatch, proxy, place):
    asked = []

    def create_connection(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", create_connection)
    monkeypatch.setattr(network, "getproxies", lambda: {"https": proxy} if proxy else {})
    monkeypatch.setattr(network, "proxy_bypass", lambda host: False)
    assert not network._connects("https://hub.example")
    assert asked == [place]
