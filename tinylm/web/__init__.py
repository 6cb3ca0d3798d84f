"""The web page's files, which `tinylm.serving.http.web` sends: HTML, CSS and ES modules, as they are."""
