"""The web page: plan, convert and publish in a browser, on this computer or as a Space."""
