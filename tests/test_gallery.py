"""The gallery: complete, self-contained, safe with any name, light; and the montage, legible on white."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from support import gallery
from support.errors import UserError
from support.gallery import Example, Gallery, gain, montage
from support.images import image_size, read_image, write_image
from support.metrics import METRICS, score
from tests.made import photograph, rain_on

ODD_NAMES = ("a b", "<b>&amp;", "\"x\" 'y'", "Überflutung 雨", "100% #1?", "c:d", "{{cards}}", r"\1 \g<0>")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)]; its text; unbalanced tags raise."""

    VOID = {"meta", "link", "img", "input"}

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def cards(self):
        return [a for tag, a in self.elements if tag == "li" and "data-name" in a]

    def links(self):
        """What the page loads or leads to."""
        keys = ("src", "data-small", "data-full", "href", "data-file")
        return [a[key] for _, a in self.elements for key in keys if key in a]


def scored(name, rainy, restored, clean, density=""):
    before = {f"input_{metric}": value for metric, value in score(rainy, clean).items()}
    return {"name": name, "density": density, **score(restored, clean), **before}


def fill(folder, names, truth=True, suffix=".png", size=(48, 64)):
    """A gallery of a picture a name, the restored ones a quarter, half, ... as rainy as the first."""
    gallery = Gallery(folder)
    for i, name in enumerate(names):
        clean = photograph(i, *size)
        rainy = rain_on(clean, i)
        left = (i + 1) / 4  # above 1: worse than the input
        restored = np.clip(clean + left * (rainy.astype(float) - clean), 0, 255).round().astype(np.uint8)
        density = name.split("/")[0] if "/" in name else ""
        file = folder / f"{name}{suffix}"
        write_image(file, restored)
        row = scored(name, rainy, restored, clean, density) if truth else {"name": name, "density": density}
        gallery.add(row, file, rainy, restored, clean if truth else None)
    return gallery


def test_the_page_shows_every_picture_and_its_files_are_there(tmp_path):
    names = [f"{density}/{i}" for density in ("Heavy", "Light") for i in range(3)]
    page = Page(fill(tmp_path, names).write({"checkpoint": "eval-EXP/derain.pt", "data": "sets/Rain1200"}))
    assert [card["data-name"] for card in page.cards()] == names
    assert [card["data-density"] for card in page.cards()] == ["Heavy"] * 3 + ["Light"] * 3
    images = [a for tag, a in page.elements if tag == "img" and "data-full" in a]
    assert len(images) == 3 * len(names)
    assert not any("src" in a for a in images), "loaded as they come into view"
    assert images[1]["data-full"] == "Heavy/0.png", "the restored file itself"
    for link in page.links():
        assert link == "data:," or (tmp_path / unquote(link)).is_file(), link
    assert page.text["title"] == "De-raining results: Rain1200"
    assert page.text["option"].endswith("HeavyLight")
    assert "eval-EXP/derain.pt" in page.text["dd"]


def test_nothing_comes_from_outside(tmp_path):
    page = Page(fill(tmp_path, ["a"]).write({}))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|<script src|srcset", page.source)
    assert not any(link.startswith(("/", "file:")) for link in page.links())


def test_any_name_is_shown_as_it_is_and_its_link_leads_to_the_file(tmp_path):
    page = Page(fill(tmp_path, ODD_NAMES).write({"data": "<i>"}, left_out=["<script>alert(1)</script>: no"]))
    assert [card["data-name"] for card in page.cards()] == list(ODD_NAMES)
    assert page.text["strong"] == "".join(ODD_NAMES)
    for card, name in zip(page.cards(), ODD_NAMES, strict=True):
        assert unquote(card["data-file"]) == f"{name}.png"
        assert not re.search(r"[ #?:\"<]", card["data-file"])
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "<script>alert(1)</script>: no" in page.text["li"]


def test_the_summary_has_means_by_density_and_counts_what_got_worse(tmp_path):
    gallery = fill(tmp_path, [f"{density}/{i}" for density in ("Heavy", "Light") for i in range(3)])
    rows = [entry.row for entry in gallery.entries]
    assert sum(gain(row) < 0 for row in rows) == 2  # of 6: 5/4 and 6/4 of the rain are left
    table = re.search("<table>.*</table>", gallery.write({}).read_text(encoding="utf-8")).group()
    lines = [re.sub(r"(<[^>]+>)+", " ", line).split() for line in table.split("<tr>")[1:]]
    by_name = {line[0]: line for line in lines}
    assert list(by_name)[1:] == ["Heavy", "Light", "all"]
    assert by_name["all"][1] == "6"
    assert [by_name[name][-1] for name in ("Heavy", "Light", "all")] == ["0", "2", "2"]
    assert by_name["Heavy"][2] == f"{np.mean([row['psnr_rgb'] for row in rows[:3]]):.2f}"
    assert by_name["Heavy"][4] == f"{np.mean([row['input_psnr_rgb'] for row in rows[:3]]):.2f}"


def with_numbers(folder, names):
    """A gallery of one picture under several names, each of whose numbers is another."""
    filled, clean = Gallery(folder), photograph(0)
    for i, name in enumerate(names):
        write_image(folder / f"{name}.png", clean)
        numbers = {f"{of}{metric}": 0.0 for of in ("input_", "") for metric in METRICS}
        numbers = {key: 10.01 * (i + 1) + 1.01 * k**2 for k, key in enumerate(numbers)}
        filled.add({"name": name, "density": "", **numbers}, folder / f"{name}.png", clean, clean, clean)
    return filled


def test_numbers_on_the_page_stand_under_their_own_pictures(tmp_path):
    filled = with_numbers(tmp_path, "ab")
    page = Page(filled.write({}))
    captions = re.findall(r'data-kind="(\w+)".*?<figcaption>(.*?)</figcaption>', page.source)
    heads = re.findall(r"<h2>(.*?)</h2>", page.source)
    for i, (entry, card) in enumerate(zip(filled.entries, page.cards(), strict=True)):
        row, shown = entry.row, dict(captions[3 * i : 3 * i + 3])
        for kind, of in (("rain", "input_"), ("restored", "")):
            expected = [f"{row[of + metric]:.{digits}f}" for metric, (_, digits) in METRICS.items()]
            assert re.findall(r"\d+\.\d+", shown[kind]) == expected
        assert shown["truth"] == "ground truth"
        gains = [gain(row, channels) for channels in ("rgb", "y")]
        assert re.findall(r"\+(\d+\.\d\d) dB", heads[i]) == [f"{value:.2f}" for value in gains]
        assert [float(card[f"data-gain-{channels}"]) for channels in ("rgb", "y")] == gains
        assert [float(card[f"data-psnr-{c}"]) for c in ("rgb", "y")] == [row["psnr_rgb"], row["psnr_y"]]


def test_the_summary_has_the_gain_on_rgb_and_on_y_and_counts_what_is_in_no_mean(tmp_path):
    filled, clean = with_numbers(tmp_path, "ab"), photograph(0, 8, 8)
    means = [np.mean([gain(e.row, channels) for e in filled.entries]) for channels in ("rgb", "y")]
    row = scored("tiny", rain_on(clean, 0), clean, clean)
    write_image(tmp_path / "tiny.png", clean)
    filled.add(row, tmp_path / "tiny.png", rain_on(clean, 0), clean, clean)
    source = filled.write({}).read_text(encoding="utf-8")
    table = re.search("<table>.*</table>", source).group()
    assert re.findall(r">\+(\d+\.\d\d) dB<", table) == [f"{mean:.2f}" for mean in means]
    # The PSNR of the equal pictures, in RGB and Y, and the SSIM of output and input.
    assert "6 values are not in these means" in source


@pytest.mark.parametrize("truth", [True, False])
def test_of_very_many_pictures_the_page_shows_the_worst_and_sums_up_all(tmp_path, monkeypatch, truth):
    monkeypatch.setattr(gallery, "MOST", 2)
    page = Page(fill(tmp_path, ["a/1", "a/2", "a/3", "a/4"], truth=truth).write({}))
    # Each is rainier than the one before; without scores the first are as good as any.
    assert [card["data-name"] for card in page.cards()] == (["a/3", "a/4"] if truth else ["a/1", "a/2"])
    which = "2 with the least gain" if truth else "first 2"
    assert f"4, of which the {which} are shown" in page.source


def test_without_ground_truth_there_are_no_scores_and_the_format_does_not_matter(tmp_path):
    page = Page(fill(tmp_path, ["a", "b"], truth=False, suffix=".tif").write({}))
    assert [a["data-kind"] for tag, a in page.elements if tag == "figure"] == ["rain", "restored"] * 2
    assert "table" not in page.text
    assert "hidden" in next(a for tag, a in page.elements if a.get("id") == "sort")
    assert page.cards()[0]["data-file"] == "a.tif"
    shown = [a["data-full"] for _, a in page.elements if "data-full" in a]
    assert all(link.endswith(".jpg") for link in shown), "browsers show no TIFF"


def test_equal_and_tiny_pictures_have_no_numbers_that_break_the_page(tmp_path):
    gallery, clean = Gallery(tmp_path), photograph(0, 8, 8)
    write_image(tmp_path / "tiny.png", clean)
    row = scored("tiny", rain_on(clean, 0), clean, clean)
    gallery.add(row, tmp_path / "tiny.png", rain_on(clean, 0), clean, clean)
    page = Page(gallery.write({}))
    assert page.cards()[0]["data-gain-rgb"] == "Infinity"  # as JavaScript reads it
    assert "∞" in page.text["b"]
    assert not re.search(r"\bnan\b|\binf\b", page.source)


def test_an_empty_run_gives_a_page(tmp_path):
    assert Page(Gallery(tmp_path).write({"data": "x"})).cards() == []


def test_thumbnails_are_small_and_large_pictures_bounded(tmp_path):
    noise = np.random.default_rng(0)
    clean = photograph(0, 512, 512)
    rainy = np.clip(clean + noise.normal(0, 25, (512, 512, 1)), 0, 255).astype(np.uint8)
    gallery = Gallery(tmp_path)
    gallery.add({"name": "a", "density": ""}, tmp_path / "a.png", rainy, rainy, clean)
    wide = np.zeros((3, 5000, 3), np.uint16) + 65535
    gallery.add({"name": "b", "density": ""}, tmp_path / "b.png", wide, wide)
    thumbnails = sorted((tmp_path / "gallery" / "small").iterdir())
    assert len(thumbnails) == 5
    assert all(max(image_size(file)) <= 256 and file.stat().st_size < 25_000 for file in thumbnails)
    assert image_size(tmp_path / "gallery" / "00002-restored.jpg") == (2, 4096)
    assert read_image(tmp_path / "gallery" / "00002-rain.jpg").min() == 255, "16 bits become 8"


def test_what_is_compared_with_a_lossless_file_has_its_colours_at_full_size(tmp_path):
    rainy = np.zeros((64, 64, 3), np.uint8)
    rainy[:, ::2, 0] = rainy[:, 1::2, 2] = 200  # columns red and blue in turn
    made = Gallery(tmp_path)
    made.add(scored("a", rainy, rainy, rainy), tmp_path / "a.png", rainy, rainy, rainy)
    for kind in ("rain", "truth"):
        shown = read_image(tmp_path / "gallery" / f"00001-{kind}.jpg").astype(int)
        assert np.abs(shown - rainy).mean() < 5


def test_examples_are_the_best_the_median_and_the_worst_or_those_named(tmp_path):
    gallery = fill(tmp_path, "abcde")
    examples = gallery.examples()
    assert [e.title for e in examples] == ["best: a", "median: c", "worst: e"]
    assert np.array_equal(examples[0].restored, read_image(tmp_path / "a.png"))
    assert [e.title for e in gallery.examples(["d", "a"])] == ["d", "a"]
    with pytest.raises(UserError, match="z: no picture of that name"):
        gallery.examples(["z"])
    assert [e.title for e in fill(tmp_path / "plain", "abcd", truth=False).examples()] == ["a", "b", "c"]


def test_of_fewer_than_three_pictures_none_is_an_example_twice(tmp_path):
    for names, titles in (("ab", ["a", "b"]), ("abc", ["best: a", "median: b", "worst: c"])):
        assert [e.title for e in fill(tmp_path / names, names).examples()] == titles


def test_a_montage_has_labels_on_white_above_and_beside_the_pictures(tmp_path):
    clean = np.full((60, 80, 3), 90, np.uint8)
    rainy = clean + np.array([60, 0, 9], np.uint8)  # no grey of a letter
    scores = scored("x", rainy, clean, clean)
    montage([Example("x" * 99, rainy, clean, clean, scores)] * 2, tmp_path / "m.png", width=240)
    image = read_image(tmp_path / "m.png")
    picture = np.argwhere((image == rainy[0, 0]).all(-1))
    (top, left), (bottom, right) = picture.min(0), picture.max(0)
    assert right - left + 1 == 240
    assert image.shape[1] > 3 * 240
    assert image.shape[0] > 2 * 180
    assert (image[[0, -1]] == 255).all()
    assert (image[:, -1] == 255).all()
    for label in (image[:top, left : right + 1], image[top : top + 180, :left], image[bottom + 1 :, left:]):
        assert label.min() < 60, "letters"
        assert np.median(label) == 255, "on white"
        dark = np.argwhere(label.min(-1) < 128)
        assert dark.min() > 0, "none cut off"
        assert (dark.max(0) < np.array(label.shape[:2]) - 1).all()


def test_a_montage_s_columns_and_numbers_are_those_of_their_labels(tmp_path, monkeypatch):
    clean, said = np.full((60, 80, 3), 90, np.uint8), {}
    rainy, restored = clean + np.array([60, 0, 9], np.uint8), clean + np.array([0, 30, 0], np.uint8)
    text = gallery.ImageDraw.ImageDraw.text

    def noted(self, at, words, *args, **options):
        said.setdefault(at[0], []).append(words)
        return text(self, at, words, *args, **options)

    monkeypatch.setattr(gallery.ImageDraw.ImageDraw, "text", noted)
    row = scored("x", rainy, restored, clean)
    montage([Example("x", rainy, restored, clean, row)], tmp_path / "m.png", width=240)
    image = read_image(tmp_path / "m.png")
    of_label = {words[0]: (x, words[1]) for x, words in said.items() if len(words) == 2}
    for label, picture, of in (
        ("rain", rainy, "input_"),
        ("restored", restored, ""),
        ("ground truth", clean, None),
    ):
        x, number = of_label[label]
        assert (image[image.shape[0] // 2, int(x)] == picture[0, 0]).all()
        numbers = f"{row[f'{of}psnr_rgb']:.2f} dB / {row[f'{of}ssim_rgb']:.4f}" if of is not None else None
        assert number == (numbers or "PSNR / SSIM on RGB")


def test_a_montage_without_truth_has_two_columns_and_pictures_keep_their_proportions(tmp_path):
    rainy = photograph(0, 100, 50)
    montage([Example("tall", rainy, rainy)], tmp_path / "two.png", width=120)
    montage([Example("tall", rainy, rainy, rainy)], tmp_path / "three.png", width=120)
    (height, two), (_, three) = image_size(tmp_path / "two.png"), image_size(tmp_path / "three.png")
    assert 120 <= three - two <= 130
    assert 240 < height < 280
    line = photograph(0, 3000, 1)  # at most four times as high as its column is wide
    montage([Example("line", line, line)], tmp_path / "line.png", width=120)
    assert 480 < image_size(tmp_path / "line.png")[0] < 520
    with pytest.raises(ValueError, match="no example"):
        montage([], tmp_path / "none.png")


def test_a_montage_s_titles_are_letters_whatever_the_script(tmp_path):
    rainy = photograph(0, 60, 80)
    for plain, title in (("cafe ???", "café 雨の夜"), ("Malmo", "Malmö")):
        for name, text in (("plain", plain), ("own", title)):
            montage([Example(text, rainy, rainy)], tmp_path / f"{name}.png")
        assert (read_image(tmp_path / "plain.png") == read_image(tmp_path / "own.png")).all()


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.004, "none>+0.00"), (-0.006, "down>−0.01"), (0.006, "up>+0.01")]
)
def test_a_gain_is_coloured_as_it_reads(value, shown):
    assert f"<b class={shown} dB</b>" == gallery._gain(value)


ACTS = """
<script>
{
const report = {errors: []};
addEventListener("error", event => report.errors.push(event.message));
const key = (name, at) => at.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const order = () => shown.map(card => card.dataset.name), at = () => stage.style.getPropertyValue("--at");
const press = text => $$("button").find(button => button.textContent == text).click();
report.name = order();
press("Worst gain first"); report.worst = order();
press("Highest PSNR"); report.highest = order();
$("#density").value = "Light"; $("#density").onchange(); report.light = order();
$("#density").value = ""; $("#density").onchange();
press("Name"); report.overflow = document.documentElement.scrollWidth - innerWidth;
shown[0].querySelector("a").focus(); key("ArrowRight", document.activeElement);
report.focus = document.activeElement.closest("li").dataset.name;
document.activeElement.click(); report.open = dialog.open && document.activeElement == handle;
key("ArrowRight", handle); report.right = at(); key("Home", handle); report.home = at();
key("2", handle); report.pair = pair; key("ArrowDown", handle); report.next = open.dataset.name;
press("Close");
setTimeout(() => {
  report.focused_again = document.activeElement.closest("li")?.dataset.name;
  report.loaded = $$("#stage img").every(image => image.naturalWidth > 0);
  document.body.innerHTML = "<pre></pre>";
  $("pre").textContent = JSON.stringify(report);
}, 500);
}
</script>
"""


def in_browser(page, script, tmp_path):
    """What the script, run in the page, leaves in a <pre> as JSON."""
    text = page.read_text(encoding="utf-8").replace("</body>", script + "</body>")
    page.write_text(text, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,800"]
    command += ["--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return json.loads(re.search("<pre>(.*)</pre>", done.stdout).group(1))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_it_sorts_filters_and_obeys_the_keyboard(tmp_path):
    names = ["Heavy/2 ü#", "Heavy/10", "Light/2", "Light/10", "Light/x"]
    report = in_browser(fill(tmp_path / "results", names).write({}), ACTS, tmp_path)
    assert report["errors"] == []
    assert report["name"] == names, "2 before 10"
    assert report["worst"][0] == "Light/x"
    assert report["highest"][0] == names[0]
    assert report["light"] == names[2:]
    assert report["overflow"] <= 0
    assert report["focus"] == names[1]
    assert report["open"]
    assert (report["right"], report["home"]) == ("52%", "0%")
    assert report["pair"] == "restored truth"
    assert report["next"] == report["focused_again"] == names[2]
    assert report["loaded"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_only_thumbnails_near_the_view_are_loaded(tmp_path):
    script = """<script>
    const loaded = card => [...card.querySelectorAll("img")].every(image => image.naturalWidth > 0);
    let ticks = 0;
    const timer = setInterval(() => {
      const report = [loaded(shown[0]), cards.filter(loaded).length];
      if (++ticks < 5 || !report[0] && ticks < 180) return;
      clearInterval(timer);
      document.body.innerHTML = "<pre></pre>";
      $("pre").textContent = JSON.stringify(report);
    }, 100);
    </script>"""
    page = fill(tmp_path / "results", [str(i) for i in range(90)], truth=False, size=(12, 16)).write({})
    first, count = in_browser(page, script, tmp_path)
    assert first
    assert count < 45


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_1_to_1_is_by_the_pixels_that_are_there_and_printing_has_all_thumbnails(tmp_path):
    script = """<script>
    const report = {};
    cards[0].querySelector("a").click();
    setTimeout(() => {
      zoom();
      const room = $("#room");
      report.width = stage.getBoundingClientRect().width * devicePixelRatio;
      report.said = $("#zoom").textContent;
      report.middle = Math.abs(room.scrollLeft - (room.scrollWidth - room.clientWidth) / 2) <= 1;
      const down = () => {
        const key = new KeyboardEvent("keydown", {key: "ArrowDown", cancelable: true, bubbles: true});
        return [room.dispatchEvent(key), open == cards[0]];
      };
      room.focus();
      report.focused = document.activeElement == room;
      report.scrolls = down();
      zoom();
      report.steps = down();
      dialog.close();
      dispatchEvent(new Event("beforeprint"));
      report.printed = $$("#cards img").every(image => image.src);
      $("#find").value = "7"; dispatchEvent(new Event("pageshow"));
      report.found = $("#count").textContent;
      document.body.innerHTML = "<pre></pre>";
      $("pre").textContent = JSON.stringify(report);
    }, 1500);
    </script>"""
    made = Gallery(tmp_path / "results")
    for i, width in enumerate([5000, *[16] * 60]):
        picture = np.zeros((12, width, 3), np.uint8)
        made.add({"name": str(i), "density": ""}, made.out / f"{i}.png", picture, picture)
    report = in_browser(made.write({}), script, tmp_path)
    assert report.pop("width") == pytest.approx(4096, abs=1)
    found = ["7", "17", "27", "37", "47", "57"]
    expected = {"said": "1 : 1 of a copy 4096 wide", "found": f"{len(found)} of 61"}
    expected |= {"scrolls": [True, True], "steps": [False, False]}  # whether the browser acts, and it stays
    assert report == expected | dict.fromkeys(["middle", "focused", "printed"], True)
