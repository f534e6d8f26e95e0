module kvserver

go 1.25
