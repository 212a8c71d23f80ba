"""The web page of marlin-convert as a Space: see README.md."""

from marlin_convert.web.page import serve

if __name__ == "__main__":
    serve("0.0.0.0", 7860, None, browser=False, say=print)
