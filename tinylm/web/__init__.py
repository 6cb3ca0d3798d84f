"""The files of the web page, which `tinylm.serving.http.web` sends unchanged: HTML, CSS and ES modules."""
