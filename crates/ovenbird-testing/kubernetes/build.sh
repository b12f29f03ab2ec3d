#!/bin/bash
# build.sh FOLDER: Kubernetes 1.20.2 (API server, controller manager, scheduler, kubelet) from Debian's source package with Debian's Go 1.15,
# in FOLDER/bin, and the image of pod sandboxes in FOLDER/img. Sources and caches go when it is done; 400 MB stay. Ten minutes on two cores.
# Go 1.15 is on purpose: built with 1.18 or newer, this version's API server crashes on a status merge-patch.
set -euo pipefail
W=$1
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | sort -u | head -1) # the one that this machine's apt uses
[ -n "$mirror" ] || { echo "apt has no mirror"; exit 1; }
key=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$W"/{apt/state/lists/partial,apt/cache/archives/partial,apt/none,bin,img,src}
: >"$W/apt/none/.keep"
printf 'deb-src [signed-by=%s] %s bookworm main\ndeb [signed-by=%s] %s bullseye main\n' $key "$mirror" $key "$mirror" >"$W/apt/sources.list"
cat >"$W/apt/apt.conf" <<C
Dir::Etc::sourcelist "$W/apt/sources.list";
Dir::Etc::sourceparts "$W/apt/none";
Dir::State "$W/apt/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$W/apt/cache";
APT::Sandbox::User "root";
C
export APT_CONFIG=$W/apt/apt.conf
apt-get update -qq
cd "$W/src"
apt-get source -qq --download-only kubernetes
apt-get download -qq golang-1.15-go golang-1.15-src
for deb in golang-1.15-*.deb; do dpkg -x "$deb" go; done
dpkg-source --no-check -x kubernetes_*.dsc k >/dev/null
cd k
export GOROOT=$W/src/go/usr/lib/go-1.15 PATH="$W/src/go/usr/lib/go-1.15/bin:$PATH" GOCACHE=$W/src/gocache GOPATH=$PWD/.go CGO_ENABLED=0 HOME=$W/src/home
mkdir -p .go/src/k8s.io "$HOME"
ln -sfn ../../.. .go/src/k8s.io/kubernetes
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_TREE_STATE=clean \
  KUBE_GIT_COMMIT=faecb196815e248d3ecfb03c680a4507229c2a56 SOURCE_DATE_EPOCH=1610544000 GOLDFLAGS="-s -w"
make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler cmd/kubelet" >"$W/build.log" 2>&1 ||
  { tail -5 "$W/build.log"; exit 1; }
cp -L _output/bin/kube-{apiserver,controller-manager,scheduler} _output/bin/kubelet "$W/bin/"
cd "$W"
rm -rf src apt build.log
