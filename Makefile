# This needs Go and nothing else. `make` builds ./kvserver.

.DEFAULT_GOAL := build
.PHONY: build run test check fuzz simulate etcd windows soak bench cover install dist clean help

# These flags do not change how packages are compiled, so what go run and go test compiled is reused.
build: ## build ./kvserver (with CGO_ENABLED=0 it needs no C library)
	go build -ldflags="-s -w" -o kvserver .

run: ## start the server
	go run .

test: ## run the tests
	go test ./...

check: ## everything that must pass: format, vet, tidy, tests with the race detector
	test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet ./...
	go vet .ci/dist.go
	go vet .ci/bench.go
	GOOS=darwin go vet ./...
	GOOS=windows go vet ./...
	go mod tidy -diff
	go test -race ./...

# FUZZTIME is a number of inputs, not a time: when a time ends, Go's fuzzer may fail without a reason
# (https://go.dev/issue/75804).
FUZZTIME ?= 60000x
fuzz: ## run every fuzz target for FUZZTIME (60000x, inputs)
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x $$package || exit 1; \
		done; \
	done

SEEDS ?= 0
SEED ?= 1
simulate: ## simulated servers with faults: SEEDS of them (0: until stopped), from seed SEED on
	KVSERVER_SEED=$(SEED) KVSERVER_SEEDS=$(SEEDS) go test -run '^TestSimulation$$' -timeout 0

etcd: ## two servers and a real etcd cluster with faults (etcd must be installed)
	KVSERVER_ETCD=1 go test -count=1 -run '^TestEtcdCluster' -v -timeout 10m ./kvstore/storage/etcd

windows: ## build for Windows, and try it (wine must be installed)
	.ci/windows

SOAK ?= 2m
soak: ## kill a real server again and again beside its clients, for SOAK (2m)
	KVSERVER_SOAK=$(SOAK) go test -run '^TestKilledServer$$' -v -timeout 0 .

bench: build ## measure it beside redis-server and memcached, if they are installed
	go run .ci/bench.go

cover: ## show what the tests reach
	go test -coverprofile=cover.out ./...
	go tool cover -func=cover.out

PREFIX ?= /usr/local
install: build ## put kvserver into PREFIX/bin (/usr/local/bin), below DESTDIR
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 kvserver $(DESTDIR)$(PREFIX)/bin/kvserver

TARGETS ?=
dist: ## make archives of the current commit in dist, for all systems or TARGETS (linux/amd64,...)
	go run .ci/dist.go -targets "$(TARGETS)"

clean: ## remove what the other targets make
	rm -rf kvserver cover.out dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
