#!/usr/bin/env bash
# Make sure that there is a Chromium with its driver for the tests of pages, and print where it is.
# As root on Debian it is installed; elsewhere this says what to install.
set -euo pipefail

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    if ! command -v apt-get >/dev/null || [[ "$(id -u)" != 0 ]]; then
        echo "browser: chromium and chromedriver are missing; install them (on Debian, as root: apt-get install chromium chromium-driver)." >&2
        exit 1
    fi
    echo "browser: installing chromium" >&2
    apt-get update --quiet >&2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium chromium-driver >&2
fi
command -v chromium
