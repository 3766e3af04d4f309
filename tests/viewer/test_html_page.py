"""The page is one file that asks nothing of the network, and that no answer's text is markup of."""

import base64
import gzip
import json
import re

from dirl_cli.viewer.html_page import page

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u202e \ud800"


def test_the_page_holds_the_payload_and_no_text_of_it():
    data = {"title": HOSTILE, "texts": [HOSTILE]}
    text = page(data)
    [packed] = re.findall(r'id="payload">([A-Za-z0-9+/=]+)</script>', text)
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == data
    assert "onerror" not in text and "\u202e" not in text
    assert text.count("</script>") == 2


def test_the_page_names_no_other_file_or_address():
    text = page({})
    assert not re.findall(r"https?:|src=|href=|url\(|@import|<link|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    assert "/* style */" not in text and "/* scripts */" not in text and "<!-- payload -->" not in text


def test_no_script_makes_markup_of_a_text():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page({}))


def test_the_same_answers_make_the_same_page():
    assert page({"title": "a"}) == page({"title": "a"})
