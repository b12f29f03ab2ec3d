#!/bin/bash
# start.sh PROGRAMS RUN SLOT: one Kubernetes with one node, whose files are all in RUN. It has a network namespace without any way further out,
# and mount and process-id namespaces, so that all of it goes when the process in RUN/init.pid ends. Up to 100 slots can run side by side.
# Prints the kubeconfig. The API server is at 10.77.(2*SLOT+1).1:16443 for this machine; pods reach this machine at 10.77.(2*SLOT+1).2.
set -eu
B=$1/bin IMG=$1/img R=$2 SLOT=$3
L=$R/log P=$R/pki NS=ovk$SLOT NODE=node CG=/ovk$SLOT
PODS=10.77.$((2 * SLOT)) LINK=10.77.$((2 * SLOT + 1)) IP=10.77.$((2 * SLOT)).1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p "$R" "$L" "$P" "$R/cni" "$R/certs.d" "$R/varlog"
ip netns add $NS
N="ip -n $NS"
$N link set lo up
$N link add br0 type bridge
$N addr add $IP/24 dev br0
$N link set br0 up
ip link add $NS type veth peer name up0 netns $NS
ip addr add $LINK.2/30 dev $NS
ip link set $NS up
$N addr add $LINK.1/30 dev up0
$N link set up0 up
ip route add $PODS.0/24 via $LINK.1 dev $NS
ip netns exec $NS sysctl -qw net.ipv4.ip_forward=1
# Everything runs below one process: when it ends, so does all the rest, with its mounts. RUN itself stays visible.
setsid nsenter --net=/run/netns/$NS unshare --mount --pid --fork --kill-child --mount-proc --propagation private \
  sh -c "mount --bind '$R/varlog' /var/log && mount -t tmpfs none /run/netns && mount --make-rshared / && exec sleep infinity" \
  >"$L/init.log" 2>&1 </dev/null &
echo $! >"$R/init.pid"
for _ in $(seq 100); do
  INIT=$(cat /proc/$(cat "$R/init.pid")/task/*/children 2>/dev/null | tr -d ' ')
  [ -n "$INIT" ] && [ "$(cat /proc/$INIT/comm)" = sleep ] && break
  sleep .05
done
run() {
  local name=$1
  shift
  setsid nsenter --target "$INIT" --mount --pid --net "$@" >"$L/$name.log" 2>&1 </dev/null &
}
cd "$P"
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=ovenbird-tests -days 30 2>/dev/null
openssl genrsa -out sa.key 2048 2>/dev/null
openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
cert() { # NAME SUBJECT ALTERNATIVE-NAMES
  openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" \
    -extfile <(echo extendedKeyUsage=serverAuth,clientAuth; [ -z "$3" ] || echo "subjectAltName=$3") 2>/dev/null
}
cert apiserver /CN=kube-apiserver "IP:$IP,IP:$LINK.1,IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"
cert admin /O=system:masters/CN=admin ""
cert kcm /CN=system:kube-controller-manager ""
cert sched /CN=system:kube-scheduler ""
cert kubelet "/O=system:nodes/CN=system:node:$NODE" "IP:$IP,DNS:$NODE"
kubeconfig() { # NAME HOST
  cat >"$R/$1.kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: tests, cluster: {server: "https://$2:16443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: tests, context: {cluster: tests, user: $1}}]
current-context: tests
K
  chmod 600 "$R/$1.kubeconfig"
}
kubeconfig admin $LINK.1
for name in kcm sched kubelet; do kubeconfig $name 127.0.0.1; done
GATES=--feature-gates=TTLAfterFinished=true # newer versions have it always
run etcd etcd --data-dir "$R/etcd" --listen-client-urls http://127.0.0.1:12379 --advertise-client-urls http://127.0.0.1:12379 \
  --listen-peer-urls http://127.0.0.1:12380 --initial-advertise-peer-urls http://127.0.0.1:12380 \
  --initial-cluster default=http://127.0.0.1:12380 --unsafe-no-fsync
run apiserver "$B/kube-apiserver" $GATES --etcd-servers=http://127.0.0.1:12379 --secure-port=16443 --advertise-address=$IP \
  --tls-cert-file="$P/apiserver.crt" --tls-private-key-file="$P/apiserver.key" --client-ca-file="$P/ca.crt" \
  --service-cluster-ip-range=10.96.0.0/16 --authorization-mode=Node,RBAC --allow-privileged=true \
  --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$P/sa.pub" --service-account-signing-key-file="$P/sa.key" \
  --kubelet-client-certificate="$P/admin.crt" --kubelet-client-key="$P/admin.key" --kubelet-preferred-address-types=InternalIP \
  --kubelet-certificate-authority="$P/ca.crt" --cert-dir="$R/apicerts"
K="kubectl --kubeconfig $R/admin.kubeconfig"
for _ in $(seq 480); do
  [ "$($K get --raw /readyz 2>/dev/null)" = ok ] && break
  sleep .25
done
[ "$($K get --raw /readyz)" = ok ] || { tail -5 "$L/apiserver.log"; exit 1; }
run kcm "$B/kube-controller-manager" $GATES --kubeconfig="$R/kcm.kubeconfig" --service-account-private-key-file="$P/sa.key" \
  --root-ca-file="$P/ca.crt" --use-service-account-credentials --leader-elect=false --cert-dir="$R/kcmcerts" \
  --node-monitor-grace-period=12s --pod-eviction-timeout=5s
run sched "$B/kube-scheduler" --kubeconfig="$R/sched.kubeconfig" --leader-elect=false --cert-dir="$R/schedcerts"
for part in cpu cpuacct cpuset memory devices freezer blkio pids systemd; do mkdir -p /sys/fs/cgroup/$part$CG; done
for file in cpus mems; do cat /sys/fs/cgroup/cpuset/cpuset.$file >/sys/fs/cgroup/cpuset$CG/cpuset.$file; done
cat >"$R/cni/10-br.conflist" <<C
{"cniVersion":"0.4.0","name":"tests","plugins":[{"type":"bridge","bridge":"br0","isGateway":false,"ipMasq":false,
 "ipam":{"type":"host-local","dataDir":"$R/ipam","ranges":[[{"subnet":"$PODS.0/24","rangeStart":"$PODS.10","gateway":"$IP"}]],
 "routes":[{"dst":"0.0.0.0/0"}]}},{"type":"loopback"}]}
C
cat >"$R/containerd.toml" <<C
version = 2
root = "$R/ctd"
state = "$R/ctds"
[grpc]
address = "$R/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "$R/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "ovenbird.local/sandbox:1"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "$R/certs.d"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$R/cni"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
C
run containerd containerd --config "$R/containerd.toml"
for _ in $(seq 120); do
  ctr -a "$R/containerd.sock" version >/dev/null 2>&1 && break
  sleep .25
done
ctr -a "$R/containerd.sock" -n k8s.io images import "$IMG/sandbox.tar" >/dev/null
echo "nameserver $LINK.2" >"$R/resolv.conf"
cat >"$R/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $IP
port: 10250
healthzPort: 0
cgroupDriver: cgroupfs
cgroupRoot: $CG
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
failSwapOn: false
makeIPTablesUtilChains: false
resolvConf: $R/resolv.conf
tlsCertFile: $P/kubelet.crt
tlsPrivateKeyFile: $P/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $P/ca.crt}}
authorization: {mode: Webhook}
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 4s
volumeStatsAggPeriod: 2s
C
run kubelet "$B/kubelet" --config="$R/kubelet.yaml" --kubeconfig="$R/kubelet.kubeconfig" --root-dir="$R/kubelet" --hostname-override=$NODE \
  --node-ip=$IP --cert-dir="$R/kubelet/pki" --container-runtime=remote --container-runtime-endpoint=unix://"$R/containerd.sock" \
  --volume-plugin-dir="$R/volplug" -v=1
for _ in $(seq 240); do
  $K get node $NODE 2>/dev/null | grep -q ' Ready' && break
  sleep .25
done
$K wait --for=condition=Ready node/$NODE --timeout=60s >/dev/null || { tail -5 "$L/kubelet.log"; exit 1; }
for _ in $(seq 100); do
  $K -n default get serviceaccount default >/dev/null 2>&1 && break
  sleep .1
done
echo "$R/admin.kubeconfig"
