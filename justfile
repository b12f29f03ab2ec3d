# Recipes for daily work. `just` alone lists them.

default:
    @just --list

# Build everything.
build:
    cargo build --workspace

# All tests (unit, cases, end to end).
test: build
    cargo nextest run --workspace

# Literate build cases; LEVEL is root, rootless or single-id, FILTER a regular expression over their names.
cases LEVEL="root" FILTER=".": build
    cargo xtask cases --level {{LEVEL}} -m '{{FILTER}}'

# The cases beside a current Docker Engine, image by image.
oracle LEVEL="root" FILTER=".": build
    cargo xtask oracle --level {{LEVEL}} -m '{{FILTER}}'

# Format, lint, tidy.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo xtask tidy

# Each fuzz target for SECONDS.
fuzz SECONDS="60":
    cargo xtask fuzz-smoke {{SECONDS}}

# Speed and memory beside other builders; ARGUMENTS as in `cargo xtask bench --help`.
bench *ARGUMENTS:
    cargo xtask bench {{ARGUMENTS}}

# Licences, bans, sources, advisories of dependencies.
deny:
    cargo deny check

# What continuous integration runs.
ci:
    bash .ci/run
