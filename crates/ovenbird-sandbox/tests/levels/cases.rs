//! The table of cases.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ovenbird_sandbox::{Level, Limits, Mount, MountSource, Network, Outcome, SandboxError, Step, StepUser, Stream};

use crate::fixture::{Place, in_place, install, listing, open_files};
use crate::programs;

const ALL: &[Level] = &Level::ALL;
const NAMESPACES: &[Level] = &[Level::Root, Level::Rootless, Level::SingleId];
const USERS: &[Level] = &[Level::Rootless, Level::SingleId];
const ROOT: &[Level] = &[Level::Root];
/// Owners are recorded.
const RECORDED: &[Level] = &[Level::SingleId, Level::Traced];
const CHROOT: &[Level] = &[Level::Chroot];
/// There are no namespaces to be had.
const BARE: &[Level] = &[Level::Chroot, Level::Traced];

/// Seconds of the step that gets killed; a fraction makes it findable.
pub(crate) const FOR_EVER: &str = "7777";
pub(crate) const MARK: &str = "OVENBIRD_SANDBOX_MARK";

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) levels: &'static [Level],
    pub(crate) script: &'static str,
    pub(crate) set_up: fn(&Place, &mut Step),
    pub(crate) check: fn(&Ran),
}

/// What a case looks at.
pub(crate) struct Ran {
    level: Level,
    place: Place,
    pub(crate) result: Result<Outcome, SandboxError>,
    pub(crate) out: String,
    pub(crate) err: String,
    elapsed: Duration,
    before: Vec<String>,
    mounts: (String, String, String),
}

impl Ran {
    pub(crate) fn outcome(&self) -> &Outcome {
        match &self.result {
            Ok(outcome) => outcome,
            Err(error) => panic!("{error}\n{}{}", self.out, self.err),
        }
    }

    pub(crate) fn says(&self, want: &str) {
        assert_eq!(self.outcome().code, 0, "{}{}", self.out, self.err);
        assert_eq!(self.out, want, "stderr: {}", self.err);
    }

    fn error(&self) -> String {
        match &self.result {
            Ok(outcome) => panic!("no error but {outcome:?}\n{}{}", self.out, self.err),
            Err(error) => error.to_string(),
        }
    }

    pub(crate) fn changes(&self) -> std::path::PathBuf {
        self.place.changes(self.level)
    }

    /// Every path in the upper folder, without what is in the root file system from the start.
    fn changed(&self) -> Vec<String> {
        let names = |lines: Vec<String>| lines.into_iter().map(|line| line.split(' ').next().unwrap_or_default().to_owned());
        let known: Vec<String> = names(self.before.clone()).collect();
        names(listing(&self.changes())).filter(|name| !name.is_empty() && !known.contains(name)).collect()
    }
}

pub(crate) fn nothing(_: &Place, _: &mut Step) {}

fn bind(source: impl AsRef<Path>, target: &str, read_only: bool) -> Mount {
    Mount { target: target.into(), source: MountSource::Bind(source.as_ref().to_owned()), read_only }
}

fn secret(target: &str, mode: u32) -> Mount {
    Mount { target: target.into(), source: MountSource::Secret { content: b"hidden".to_vec(), mode, uid: 0, gid: 0 }, read_only: true }
}

fn user(step: &mut Step) {
    step.user = StepUser { uid: 1000, gid: 1001, groups: vec![1002] };
}

const COREUTILS: &str = "stat_by_coreutils";
const GNU: [&str; 2] = ["/usr/bin/stat", "/usr/bin/cp"];

/// Why a case cannot run on this machine.
pub(crate) fn missing(case: &str) -> Option<&'static str> {
    let gnu = || GNU.iter().all(|path| fs::read(path).is_ok_and(|bytes| bytes.windows(13).any(|part| part == b"GNU coreutils")));
    (case == COREUTILS && !gnu()).then_some("the machine's stat and cp are not those of GNU coreutils")
}

pub(crate) fn all() -> Vec<Case> {
    let mut all = programs::cases();
    all.extend(crate::raw::cases());
    all.extend(own());
    all
}

fn own() -> Vec<Case> {
    vec![
        Case {
            name: "streams_and_code",
            levels: ALL,
            script: "echo out; echo err >&2; exit 7",
            set_up: nothing,
            check: |ran| assert_eq!((ran.outcome().code, &*ran.out, &*ran.err), (7, "out\n", "err\n")),
        },
        Case {
            name: "signal",
            levels: ALL,
            script: "sh -c 'kill -9 $$'; exit $?",
            set_up: nothing,
            check: |ran| assert_eq!(ran.outcome().code, 137),
        },
        Case {
            name: "big_output_and_stdin",
            levels: ALL,
            script: "cat",
            set_up: |_, step| step.stdin = b"0123456789abcdef".repeat(100_000),
            check: |ran| ran.says(&"0123456789abcdef".repeat(100_000)),
        },
        Case { name: "no_stdin", levels: ALL, script: "cat", set_up: nothing, check: |ran| ran.says("") },
        Case {
            name: "first_process",
            levels: NAMESPACES,
            script: "echo $$; hostname; cat /etc/hostname",
            set_up: nothing,
            check: |ran| ran.says("1\nbuilder\nbuilder\n"),
        },
        Case {
            name: "nothing_lands_in_the_layer",
            levels: ALL,
            script: "cat /etc/hosts /etc/resolv.conf >/dev/null && test -c /dev/null && test -d /proc",
            set_up: nothing,
            check: |ran| {
                ran.says("");
                assert_eq!(listing(&ran.changes()).len(), if in_place(ran.level) { ran.before.len() } else { 1 }, "{:?}", ran.changed());
                if in_place(ran.level) {
                    assert_eq!(listing(&ran.changes()), ran.before);
                }
                assert_eq!(listing(&ran.place.path("scratch")).len(), 1, "the scratch folder is empty again");
            },
        },
        Case {
            name: "copied_up_folders_go_too",
            levels: NAMESPACES,
            script: "true",
            set_up: |place, _| {
                fs::create_dir_all(place.path("lower/etc/deep")).unwrap();
                fs::write(place.path("lower/etc/old"), "x").unwrap();
            },
            check: |ran| {
                ran.says("");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "real_files_beside_stubs_stay",
            levels: ALL,
            script: "cat /run/secrets/one; touch /run/real /etc/real",
            set_up: |_, step| step.mounts.push(secret("/run/secrets/one", 0o400)),
            check: |ran| {
                ran.says("hidden");
                assert_eq!(ran.changed(), ["etc", "etc/real", "run", "run/real"]);
            },
        },
        Case {
            name: "etc_files_come_back",
            levels: ALL,
            script: "grep -q localhost /etc/hosts && echo poison >/etc/hosts; ls /etc",
            set_up: |place, _| {
                fs::create_dir_all(place.path("lower/etc")).unwrap();
                fs::write(place.path("lower/etc/hosts"), "original").unwrap();
                fs::set_permissions(place.path("lower/etc/hosts"), fs::Permissions::from_mode(0o640)).unwrap();
                symlink("../nowhere/resolv.conf", place.path("lower/etc/resolv.conf")).unwrap();
            },
            check: |ran| {
                assert_eq!(ran.outcome().code, 0, "{}", ran.err);
                assert_eq!(fs::read_to_string(ran.place.path("lower/etc/hosts")).unwrap(), "original");
                assert_eq!(listing(&ran.place.path("lower")), ran.before);
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "hostile_links_stay_inside",
            levels: ALL,
            script: "echo x >/run/inside; ls -d /proc /dev >/dev/null",
            set_up: |place, step| {
                let outside = place.path("outside");
                for name in ["etc", "run"] {
                    symlink(&outside, place.path("lower").join(name)).unwrap();
                }
                symlink("../../../../../../../../tmp", place.path("lower/up")).unwrap();
                step.mounts.push(secret("/up/x/secret", 0o444));
                step.mounts.push(secret("/run/secret", 0o444));
            },
            check: |ran| {
                assert_eq!(fs::read_dir(ran.place.path("outside")).unwrap().count(), 0);
                assert!(!Path::new("/tmp/x/secret").exists());
                ran.outcome();
            },
        },
        Case {
            name: "program_missing",
            levels: ALL,
            script: "",
            set_up: |_, step| step.args = vec!["no-such-program".into()],
            check: |ran| {
                assert!(matches!(ran.result, Err(SandboxError::Exec { .. })), "{:?}", ran.result);
                assert!(ran.error().contains("no-such-program"));
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "program_not_executable",
            levels: ALL,
            script: "",
            set_up: |place, step| {
                fs::write(place.path("lower/text"), "text").unwrap();
                step.args = vec!["/text".into()];
            },
            check: |ran| {
                assert!(
                    matches!(&ran.result, Err(SandboxError::Exec { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied),
                    "{:?}",
                    ran.result
                );
            },
        },
        Case {
            name: "working_directory_is_made",
            levels: ALL,
            script: "pwd",
            set_up: |_, step| step.cwd = "/srv/app/sub".into(),
            check: |ran| {
                ran.says("/srv/app/sub\n");
                assert_eq!(ran.changed(), ["srv", "srv/app", "srv/app/sub"]);
            },
        },
        Case {
            name: "user",
            levels: ALL,
            script: "id -u; id -g; id -G; mkdir /tmp/d; touch /tmp/f; ln -s x /tmp/l",
            set_up: |place, step| {
                user(step);
                fs::create_dir(place.path("lower/tmp")).unwrap();
                fs::set_permissions(place.path("lower/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
            },
            check: |ran| {
                ran.says("1000\n1001\n1001 1002\n");
                let disk = fs::symlink_metadata(ran.changes().join("tmp/f")).unwrap();
                match ran.level {
                    Level::Root | Level::Chroot | Level::Rootless => assert_eq!((disk.uid(), disk.gid()), (1000, 1001)),
                    Level::SingleId | Level::Traced => {
                        let owners = &ran.outcome().owners;
                        let owned: Vec<_> = owners.iter().map(|(path, uid, gid, _)| (path.to_str().unwrap(), *uid, *gid)).collect();
                        assert_eq!(owned, [("tmp/d", 1000, 1001), ("tmp/f", 1000, 1001), ("tmp/l", 1000, 1001)]);
                    }
                }
            },
        },
        Case {
            name: "nothing_is_left_running",
            levels: ALL,
            script: "(sleep 7000 &); (setsid sleep 7000 &) ; sh -c 'trap \"\" TERM HUP; (sleep 7000; sleep 7000) &'; echo done",
            set_up: nothing,
            check: |ran| {
                ran.says("done\n");
                assert!(ran.elapsed < Duration::from_mins(1));
            },
        },
        Case {
            name: "network_none",
            levels: NAMESPACES,
            script: "ls /sys/class/net; ip -4 -o addr show lo | grep -c 127.0.0.1; cat /etc/resolv.conf",
            set_up: |_, step| step.network = Network::None,
            check: |ran| ran.says("lo\n1\n"),
        },
        Case {
            name: "network_none_refused",
            levels: BARE,
            script: "true",
            set_up: |_, step| step.network = Network::None,
            check: |ran| {
                let want = format!("--network none is not possible at the {} level", ran.level.name());
                assert!(ran.error().contains(&want), "{}", ran.error());
            },
        },
        Case {
            name: "shm_size",
            levels: NAMESPACES,
            script: "df -k /dev/shm | tail -1 | awk '{print $2}'",
            set_up: |_, step| step.limits.shm_size = Some(12 << 20),
            check: |ran| ran.says("12288\n"),
        },
        Case {
            name: "shm_default",
            levels: NAMESPACES,
            script: "df -k /dev/shm | tail -1 | awk '{print $2}'; stat -c %a /dev/shm",
            set_up: nothing,
            check: |ran| ran.says("65536\n1777\n"),
        },
        Case {
            name: "folders_removed_by_the_step",
            levels: CHROOT,
            script: "rm -rf /etc /proc /dev /cache /home; echo $?",
            set_up: |place, step| {
                fs::create_dir_all(place.path("lower/etc")).unwrap();
                fs::create_dir(place.path("lower/proc")).unwrap();
                fs::create_dir_all(place.path("lower/home/user")).unwrap();
                fs::set_permissions(place.path("lower/etc"), fs::Permissions::from_mode(0o751)).unwrap();
                fs::write(place.path("lower/etc/hosts"), "of the image").unwrap();
                fs::write(place.path("lower/etc/gone"), "").unwrap();
                fs::write(place.path("outside/kept"), "").unwrap();
                fs::create_dir(place.path("lent")).unwrap();
                fs::write(place.path("lent/removed"), "").unwrap();
                step.mounts = vec![bind(place.path("outside"), "/home/user/mount", true), bind(place.path("lent"), "/cache", false)];
            },
            check: |ran| {
                ran.says("0\n");
                let at = |name: &str| ran.changes().join(name);
                assert_eq!(fs::read_to_string(at("etc/hosts")).unwrap(), "of the image");
                assert_eq!(fs::metadata(at("etc")).unwrap().mode() & 0o7777, 0o751);
                assert!(at("proc").is_dir() && at("home/user").is_dir());
                for name in ["etc/gone", "etc/resolv.conf", "dev", "sys", "cache", "home/user/mount"] {
                    assert!(!at(name).exists(), "{name}");
                }
                assert!(ran.place.path("outside/kept").exists());
                assert_eq!(fs::read_dir(ran.place.path("lent")).unwrap().count(), 0);
            },
        },
        Case {
            name: "folders_moved_by_the_step",
            levels: CHROOT,
            script: "mv /etc /etc2 && ln -s /tmp /etc && mkdir -p /tmp; echo $?",
            set_up: |place, _| {
                fs::create_dir_all(place.path("lower/etc")).unwrap();
                fs::write(place.path("lower/etc/hosts"), "of the image").unwrap();
            },
            check: |ran| {
                ran.says("0\n");
                let at = |name: &str| ran.changes().join(name);
                assert_eq!(fs::read_to_string(at("etc2/hosts")).unwrap(), "of the image");
                assert_eq!(fs::read_link(at("etc")).unwrap(), Path::new("/tmp"));
                assert!(!at("etc2/resolv.conf").exists() && fs::read_dir(at("tmp")).unwrap().next().is_none());
            },
        },
        Case {
            name: "folder_on_a_file",
            levels: ALL,
            script: "true",
            set_up: |place, step| step.mounts = vec![bind(place.path("outside"), "/bin/busybox", false)],
            check: |ran| assert!(ran.error().starts_with("cannot mount on /bin/busybox: there is a file"), "{}", ran.error()),
        },
        Case {
            name: "file_on_a_folder",
            levels: ALL,
            script: "true",
            set_up: |_, step| step.mounts = vec![secret("/bin", 0o400)],
            check: |ran| assert!(ran.error().starts_with("cannot mount on /bin: there is a folder"), "{}", ran.error()),
        },
        Case {
            name: "mount_below_a_file",
            levels: ALL,
            script: "true",
            set_up: |_, step| step.mounts = vec![secret("/bin/busybox/x", 0o400)],
            check: |ran| assert!(ran.error().starts_with("cannot mount on /bin/busybox/x"), "{}", ran.error()),
        },
        Case {
            name: "working_directory_below_a_file",
            levels: ALL,
            script: "true",
            set_up: |_, step| step.cwd = "/bin/busybox/x".into(),
            check: |ran| assert!(ran.error().starts_with("cannot use the working directory /bin/busybox/x"), "{}", ran.error()),
        },
        Case {
            name: "loop_in_the_root",
            levels: ALL,
            script: "true",
            set_up: |place, _| symlink("etc", place.path("lower/etc")).unwrap(),
            check: |ran| {
                let want = "the root file system is malformed: /etc/resolv.conf";
                assert!(ran.error().starts_with(want), "{}", ran.error());
            },
        },
        Case {
            name: "owners_of_hard_links",
            levels: RECORDED,
            script: "cd /low; echo more >> a; rm c; echo new > c; mkdir d; chmod 600 node; mknod fresh c 1 3; chmod 640 fresh",
            set_up: |place, step| {
                fs::create_dir(place.path("lower/low")).unwrap();
                for (name, other) in [("a", "b"), ("c", "e")] {
                    fs::write(place.path("lower/low").join(name), "").unwrap();
                    fs::hard_link(place.path("lower/low").join(name), place.path("lower/low").join(other)).unwrap();
                }
                fs::write(place.path("lower/low/node"), "").unwrap();
                step.lower_owners = ["a", "b", "c", "e"].map(|name| (Path::new("low").join(name), 40, 41, None)).to_vec();
                step.lower_owners.push(("low/node".into(), 0, 0, Some((libc::S_IFCHR | 0o644, 1, 5))));
            },
            check: |ran| {
                ran.says("");
                let mut want = vec![
                    ("low/a".into(), 40, 41, None),
                    ("low/fresh".into(), 0, 0, Some((libc::S_IFCHR | 0o640, 1, 3))),
                    ("low/node".into(), 0, 0, Some((libc::S_IFCHR | 0o600, 1, 5))),
                ];
                if in_place(ran.level) {
                    // What was not changed is there too.
                    want.splice(1..1, [("low/b".into(), 40, 41, None), ("low/e".into(), 40, 41, None)]);
                }
                assert_eq!(ran.outcome().owners, want);
            },
        },
        Case {
            name: "shm_size_refused",
            levels: BARE,
            script: "true",
            set_up: |_, step| step.limits.shm_size = Some(1),
            check: |ran| assert!(ran.error().contains("--shm-size")),
        },
        Case {
            name: "host_name_refused",
            levels: CHROOT,
            script: "true",
            set_up: |_, step| step.hostname = "asked-for".into(),
            check: |ran| assert!(ran.error().contains("--hostname is not possible at the chroot level"), "{}", ran.error()),
        },
        Case {
            name: "ulimits",
            levels: ALL,
            script: "ulimit -n; ulimit -H -n; ulimit -c",
            set_up: |_, step| step.limits.ulimits = vec![("nofile".into(), 123, 456), ("core".into(), 0, 0)],
            check: |ran| ran.says("123\n456\n0\n"),
        },
        Case {
            name: "ulimit_unknown",
            levels: ALL,
            script: "true",
            set_up: |_, step| step.limits.ulimits = vec![("files".into(), 1, 1)],
            check: |ran| assert!(ran.error().contains("there is no limit \"files\"")),
        },
        Case {
            name: "memory_limit",
            levels: ROOT,
            script: "dd if=/dev/zero of=/dev/null bs=300M count=1",
            set_up: |_, step| step.limits = Limits { memory: Some(40 << 20), ..Limits::default() },
            check: |ran| match &ran.result {
                Err(SandboxError::Refused { option, .. }) => assert!(option.starts_with("--memory")),
                _ => {
                    assert!(ran.outcome().out_of_memory, "{:?}", ran.result);
                    assert!(ran.outcome().peak_memory.is_some_and(|peak| peak <= 41 << 20), "{:?}", ran.result);
                }
            },
        },
        Case {
            name: "memory_within_limit",
            levels: ROOT,
            script: "dd if=/dev/zero of=/dev/null bs=1M count=1 2>/dev/null",
            set_up: |_, step| step.limits = Limits { memory: Some(100 << 20), cpus: Some(0.5), ..Limits::default() },
            check: |ran| {
                if !matches!(ran.result, Err(SandboxError::Refused { .. })) {
                    assert!(!ran.outcome().out_of_memory);
                    ran.says("");
                }
            },
        },
        Case {
            name: "memory_refused_by_name",
            levels: USERS,
            script: "true",
            set_up: |_, step| step.limits.memory = Some(40 << 20),
            check: |ran| {
                if let Err(error) = &ran.result {
                    assert!(error.to_string().starts_with("--memory 41943040 is not possible at the "), "{error}");
                }
            },
        },
        Case {
            name: "capabilities_and_filter",
            levels: NAMESPACES,
            script: "grep -E '^(CapInh|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status; mount -t tmpfs x /mnt 2>/dev/null || echo refused; unshare -r true 2>/dev/null || echo refused",
            set_up: nothing,
            check: |ran| {
                ran.says("CapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000\nNoNewPrivs:\t0\nrefused\nrefused\n");
            },
        },
        Case {
            name: "no_capabilities_for_users",
            levels: &[Level::Root, Level::Rootless],
            script: "grep -E '^Cap(Eff|Prm)' /proc/self/status",
            set_up: |_, step| user(step),
            check: |ran| ran.says("CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n"),
        },
        Case {
            name: "insecure",
            levels: NAMESPACES,
            script: "mkdir /m && mount -t tmpfs x /m && echo mounted",
            set_up: |_, step| step.insecure = true,
            check: |ran| ran.says("mounted\n"),
        },
        Case {
            name: "masked_paths",
            levels: NAMESPACES,
            script: "(echo 1 >/proc/sys/vm/panic_on_oom) 2>/dev/null || echo ro; cat /proc/timer_list /proc/keys | wc -c; ls /sys/firmware | wc -l; (mkdir /sys/x) 2>/dev/null || echo ro",
            set_up: nothing,
            check: |ran| ran.says("ro\n0\n0\nro\n"),
        },
        Case {
            name: "devices",
            levels: ALL,
            script: "echo x >/dev/null; head -c 3 /dev/zero | wc -c; head -c 5 /dev/urandom | wc -c; (echo >/dev/full) 2>/dev/null || echo full; readlink /dev/fd; readlink /dev/stdout",
            set_up: nothing,
            check: |ran| ran.says("3\n5\nfull\n/proc/self/fd\n/proc/self/fd/1\n"),
        },
        Case {
            name: "pty",
            levels: NAMESPACES,
            script: "exec 3<>/dev/ptmx; ls /dev/pts",
            set_up: nothing,
            check: |ran| ran.says("0\nptmx\n"),
        },
        Case {
            name: "hosts_and_dns",
            levels: ALL,
            script: "grep -E 'example|six' /etc/hosts; grep nameserver /etc/resolv.conf",
            set_up: |_, step| {
                step.hosts = vec![("example".into(), "10.1.2.3".parse().unwrap()), ("six".into(), "fd00::1".parse().unwrap())];
                step.dns = vec!["10.9.9.9".parse().unwrap(), "fd00::2".parse().unwrap()];
            },
            check: |ran| ran.says("10.1.2.3\texample\nfd00::1\tsix\nnameserver 10.9.9.9\nnameserver fd00::2\n"),
        },
        Case {
            name: "secret_mode",
            levels: ALL,
            script: "stat -c %a /s; cat /s",
            set_up: |_, step| step.mounts.push(secret("/s", 0o440)),
            check: |ran| {
                ran.says("440\nhidden");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "read_only_bind",
            levels: &[Level::Root, Level::Rootless, Level::SingleId, Level::Traced],
            script: "cat /in/a; (echo y >/in/a) 2>/dev/null || echo ro",
            set_up: |place, step| {
                fs::write(place.path("outside/a"), "x\n").unwrap();
                step.mounts.push(bind(place.path("outside"), "/in", true));
            },
            check: |ran| {
                ran.says("x\nro\n");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "writable_bind",
            levels: ALL,
            script: "cat /cache/dir/a; echo new >/cache/dir/b; rm /cache/dir/a",
            set_up: |place, step| {
                fs::write(place.path("outside/a"), "old\n").unwrap();
                fs::create_dir_all(place.path("lower/cache/dir")).unwrap();
                fs::write(place.path("lower/cache/dir/under"), "stays").unwrap();
                step.mounts.push(bind(place.path("outside"), "/cache/dir", false));
            },
            check: |ran| {
                ran.says("old\n");
                assert_eq!(fs::read_to_string(ran.place.path("outside/b")).unwrap(), "new\n");
                assert!(!ran.place.path("outside/a").exists());
                assert_eq!(ran.changed(), Vec::<String>::new());
                assert_eq!(fs::read_to_string(ran.place.path("lower/cache/dir/under")).unwrap(), "stays");
            },
        },
        Case {
            name: "file_bind",
            levels: ALL,
            script: "cat /file",
            set_up: |place, step| {
                fs::write(place.path("outside/a"), "one file\n").unwrap();
                step.mounts.push(bind(place.path("outside/a"), "/file", true));
            },
            check: |ran| {
                ran.says("one file\n");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "layers",
            levels: ALL,
            script: "cat /l/a /l/b; echo gone >/l/c; cat /l/c",
            set_up: |place, step| {
                for (layer, name) in [("one", "a"), ("two", "b")] {
                    fs::create_dir_all(place.path(layer).join("sub")).unwrap();
                    fs::write(place.path(layer).join("sub").join(name), format!("{layer}\n")).unwrap();
                }
                symlink("/sub", place.path("two/link")).unwrap();
                let lowers = vec![place.path("two"), place.path("one")];
                step.mounts.push(Mount {
                    target: "/l".into(),
                    source: MountSource::Layers { lowers, subpath: "link".into() },
                    read_only: false,
                });
            },
            check: |ran| {
                ran.says("one\ntwo\ngone\n");
                assert_eq!(ran.changed(), Vec::<String>::new());
                assert!(!ran.place.path("two/sub/c").exists() && !ran.place.path("one/sub/c").exists());
            },
        },
        Case {
            name: "single_read_only_layer",
            levels: ALL,
            script: "cat /l",
            set_up: |place, step| {
                fs::create_dir_all(place.path("one")).unwrap();
                fs::write(place.path("one/a"), "file\n").unwrap();
                step.mounts.push(Mount {
                    target: "/l".into(),
                    source: MountSource::Layers { lowers: vec![place.path("one")], subpath: "a".into() },
                    read_only: true,
                });
            },
            check: |ran| {
                ran.says("file\n");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "layer_subpath_cannot_leave",
            levels: ALL,
            script: "ls /l",
            set_up: |place, step| {
                fs::create_dir_all(place.path("one/etc")).unwrap();
                fs::write(place.path("one/etc/inner"), "").unwrap();
                symlink("/etc", place.path("one/x")).unwrap();
                step.mounts.push(Mount {
                    target: "/l".into(),
                    source: MountSource::Layers { lowers: vec![place.path("one")], subpath: "x".into() },
                    read_only: true,
                });
            },
            check: |ran| ran.says("inner\n"),
        },
        Case {
            name: "tmpfs",
            levels: &[Level::Root, Level::Rootless, Level::SingleId, Level::Chroot],
            script: "stat -c %a /t; echo x >/t/a",
            set_up: |_, step| {
                step.mounts.push(Mount { target: "/t".into(), source: MountSource::Tmpfs { size: Some(1 << 20) }, read_only: false });
            },
            check: |ran| {
                ran.says("1777\n");
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "owners_of_mounts",
            levels: &[Level::Root, Level::SingleId, Level::Chroot, Level::Traced],
            script: "stat -c %u:%g /run/s /c; ls -ldn /c | tr -s ' ' | cut -d ' ' -f 3,4",
            set_up: |place, step| {
                step.mounts.push(Mount {
                    target: "/run/s".into(),
                    source: MountSource::Secret { content: b"hidden".to_vec(), mode: 0o400, uid: 1000, gid: 7 },
                    read_only: true,
                });
                // Where the disk can hold the owner, it does.
                let _ = std::os::unix::fs::chown(place.path("outside"), Some(1000), Some(7));
                step.mounts.push(bind(place.path("outside"), "/c", false));
                step.mount_owners.push(("/c".into(), 1000, 7));
            },
            check: |ran| ran.says("1000:7\n1000:7\n1000 7\n"),
        },
        Case {
            name: "nested_mounts",
            levels: ALL,
            script: "cat /cache/inner/s",
            set_up: |place, step| {
                step.mounts.push(bind(place.path("outside"), "/cache", false));
                step.mounts.push(secret("/cache/inner/s", 0o444));
            },
            check: |ran| {
                ran.says("hidden");
                // The mount point inside the shared folder may stay (another step may be using it), never what was mounted there.
                let stub = fs::read(ran.place.path("outside").join("inner/s")).unwrap_or_default();
                assert!(stub.is_empty(), "{:?}", listing(&ran.place.path("outside")));
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "mount_on_root_refused",
            levels: ALL,
            script: "true",
            set_up: |_, step| step.mounts.push(secret("/", 0o444)),
            check: |ran| assert!(ran.error().contains("root itself"), "{}", ran.error()),
        },
        Case {
            name: "missing_bind_source",
            levels: ALL,
            script: "true",
            set_up: |place, step| step.mounts.push(bind(place.path("nowhere"), "/x", true)),
            check: |ran| {
                assert!(ran.error().contains("/x"), "{}", ran.error());
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "five_hundred_layers",
            levels: NAMESPACES,
            script: "cat /f/* | wc -l",
            set_up: |place, step| {
                let mut lowers = vec![place.path("lower")];
                for index in 0..499 {
                    let layer = place.path(&format!("layers/{index}"));
                    fs::create_dir_all(layer.join("f")).unwrap();
                    fs::write(layer.join(format!("f/{index}")), "line\n").unwrap();
                    lowers.push(layer);
                }
                step.root = ovenbird_sandbox::Root::Overlay { lowers, upper: place.path("upper"), work: place.path("work") };
            },
            check: |ran| ran.says("499\n"),
        },
        Case {
            name: "no_lower_layers",
            levels: NAMESPACES,
            script: "",
            set_up: |place, step| {
                step.root = ovenbird_sandbox::Root::Overlay { lowers: vec![], upper: place.path("upper"), work: place.path("work") }
            },
            check: |ran| {
                assert!(matches!(ran.result, Err(SandboxError::Exec { .. })), "{:?}", ran.result);
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
        Case {
            name: "plain_folder",
            levels: NAMESPACES,
            script: "touch /made",
            set_up: |place, step| step.root = ovenbird_sandbox::Root::Dir(place.path("lower")),
            check: |ran| {
                ran.says("");
                let after: Vec<String> =
                    listing(&ran.place.path("lower")).iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
                assert_eq!(after.len(), ran.before.len() + 1);
                assert!(after.contains(&"made".to_owned()));
            },
        },
        Case {
            name: "engine_sees_no_mount",
            levels: ALL,
            script: "echo now; sleep 0.3",
            set_up: nothing,
            check: |ran| {
                ran.says("now\n");
                assert_eq!(ran.mounts.0, ran.mounts.1, "during the step");
                assert_eq!(ran.mounts.0, ran.mounts.2, "after the step");
            },
        },
        Case {
            name: "owners",
            levels: RECORDED,
            script: "cd /; echo >a; chown 1:2 a; echo >b; chown 3:4 b; mv b c; echo >d; chown 5:6 d; rm d; for i in 1 2 3 4 5; do echo >new$i; done; chown 0:9 low/f; mv low/g low/h; mknod node c 5 1; mknod pipe p; chown 0:0 low/k; chown -h 7:7 link; chroot /low /bin/busybox chown 8:8 /inside",
            set_up: |place, step| {
                fs::create_dir_all(place.path("lower/low/bin")).unwrap();
                fs::copy(place.path("lower/bin/busybox"), place.path("lower/low/bin/busybox")).unwrap();
                for name in ["f", "g", "k", "inside", "untouched"] {
                    fs::write(place.path("lower/low").join(name), name).unwrap();
                }
                symlink("nowhere", place.path("lower/link")).unwrap();
                step.lower_owners = ["f", "g", "k", "untouched"].map(|name| (Path::new("low").join(name), 40, 41, None)).to_vec();
            },
            check: |ran| {
                ran.says("");
                let got: Vec<_> = ran
                    .outcome()
                    .owners
                    .iter()
                    .map(|(path, uid, gid, node)| {
                        (path.to_str().unwrap(), *uid, *gid, node.map(|node| (node.0 & libc::S_IFMT, node.1, node.2)))
                    })
                    .collect();
                let mut want = vec![
                    ("a", 1, 2, None),
                    ("c", 3, 4, None),
                    ("link", 7, 7, None),
                    ("low/f", 0, 9, None),
                    ("low/h", 40, 41, None),
                    ("low/inside", 8, 8, None),
                    ("node", 0, 0, Some((libc::S_IFCHR, 5, 1))),
                ];
                if in_place(ran.level) {
                    want.insert(6, ("low/untouched", 40, 41, None));
                }
                assert_eq!(got, want);
            },
        },
        Case {
            name: "dropped_privileges_look_dropped",
            levels: RECORDED,
            script: "adduser -D -H app 2>/dev/null; su app -c 'id -u; touch /tmp/f; chown 0 /tmp/f 2>/dev/null || echo refused; sh -c \"id -u\"'; id -u; sed -i s/x/y/ /etc/shadow; stat -c %u:%g /etc/shadow /tmp/f; su app -c 'mkfifo /tmp/p'; stat -c %u:%g /tmp/p",
            set_up: |place, step| {
                for name in ["etc", "tmp", "home"] {
                    fs::create_dir_all(place.path("lower").join(name)).unwrap();
                }
                fs::write(place.path("lower/etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n").unwrap();
                fs::write(place.path("lower/etc/group"), "root:x:0:\napp:x:1000:\n").unwrap();
                fs::write(place.path("lower/etc/shadow"), "root:x:\n").unwrap();
                step.lower_owners = vec![("etc/shadow".into(), 0, 42, None)];
            },
            check: |ran| {
                ran.says("1000\nrefused\n1000\n0\n0:42\n1000:1000\n1000:1000\n");
                for row in [("tmp/f".into(), 1000, 1000, None), ("tmp/p".into(), 1000, 1000, None), ("etc/shadow".into(), 0, 42, None)] {
                    assert!(ran.outcome().owners.contains(&row), "{row:?} in {:?}", ran.outcome().owners);
                }
            },
        },
        Case {
            name: "stat_tells_the_owner",
            levels: RECORDED,
            script: r#"
                cd /
                echo a >f; stat -c %u:%g low/f f; chown 5:6 f; stat -c "%u:%g path" f
                stat -Lc "%u:%g stream" /dev/stdin <f; stat -Lc "%u:%g descriptor" /proc/self/fd/0 <f
                sed -i s/a/b/ f; stat -c "%u:%g fstat, fchown" f
                (cd low; stat -c "%u:%g relative" ../f)
                cp -a f copy; stat -c "%u:%g cp -a" copy; cp -a low/f lowcopy; stat -c "%u:%g lower cp -a" lowcopy
                mkdir x; tar c f | tar x -C x; stat -c "%u:%g tar" x/f
                chgrp 9 f; stat -c "%u:%g chgrp" f; chgrp 9 low/f; stat -c "%u:%g lower chgrp" low/f
                mv f m; stat -c "%u:%g rename" m; ln m n; stat -c "%u:%g hard link" n
                ln -s m l; stat -c "%u:%g link" l; stat -Lc "%u:%g followed" l; chown -h 7:8 l; stat -c "%u:%g chown -h" l
                mkdir d; chown 3:4 d; stat -c "%u:%g folder" d; chown 1:1 inside; chown 8:8 low/inside
                chroot /low /bin/busybox stat -c "%u:%g chroot" /inside; stat -c "%u:%g outside" /inside
                mknod c c 5 1; chmod 600 c; stat -c "%F %t,%T %a" c
                rm m n; echo >m; stat -c "%u:%g another" m; find / -xdev -user 5 | sort
                ln -s loop loop; for name in missing m/x loop; do stat -L $name 2>/dev/null || echo "no $name"; done
                mv low/g low/f; stat -c "%u:%g replaced" low/f; stat -c "%u:%g machine" /proc/self/stat /dev/null
            "#,
            set_up: |place, step| {
                fs::create_dir_all(place.path("lower/low/bin")).unwrap();
                fs::copy(place.path("lower/bin/busybox"), place.path("lower/low/bin/busybox")).unwrap();
                for name in ["inside", "low/f", "low/g", "low/inside"] {
                    fs::write(place.path("lower").join(name), name).unwrap();
                }
                step.lower_owners = vec![("low/f".into(), 40, 41, None), ("/low/g".into(), 50, 51, None)];
            },
            check: |ran| {
                // The machine's own root is mapped at one of the two levels only.
                let machine = if ran.level == Level::Traced { "0:0" } else { "65534:65534" };
                let want = "40:41\n0:0\n5:6 path\n5:6 stream\n5:6 descriptor\n5:6 fstat, fchown\n5:6 relative\n5:6 cp -a\n40:41 lower cp -a\n\
                     5:6 tar\n5:9 chgrp\n40:9 lower chgrp\n5:9 rename\n5:9 hard link\n0:0 link\n5:9 followed\n7:8 chown -h\n3:4 folder\n\
                     8:8 chroot\n1:1 outside\ncharacter special file 5,1 600\n0:0 another\n/copy\n/x/f\nno missing\nno m/x\nno loop\n\
                     50:51 replaced\n0:0 machine\n";
                ran.says(&format!("{want}{machine} machine\n"));
            },
        },
        Case {
            name: "stat_calls",
            levels: RECORDED,
            script: "echo >/f; ln -s f /l; ln -s loop /loop; mkdir /d; chown 5:6 /f; chown 7:8 /d; cd /d; exec /inside",
            set_up: |place, step| {
                install(Path::new("/proc/self/exe"), &place.path("lower/inside"), place);
                step.env.push(format!("{}={}", crate::CASE, crate::calls::NAME).into());
                if matches!(step.root, ovenbird_sandbox::Root::Overlay { .. }) {
                    step.env.push(format!("{}=1", crate::calls::KERNEL).into());
                }
            },
            check: |ran| ran.says(""),
        },
        Case {
            name: COREUTILS,
            levels: RECORDED,
            script: "echo >/f; chown 5:6 /f; /gnu/stat -c %u:%g /f; /gnu/stat -c %u:%g - </f; /gnu/cp -a /f /g; /gnu/stat -c %u:%g /g",
            set_up: |place, _| {
                fs::create_dir(place.path("lower/gnu")).unwrap();
                for (program, name) in GNU.into_iter().zip(["stat", "cp"]) {
                    install(Path::new(program), &place.path("lower/gnu").join(name), place);
                }
            },
            check: |ran| ran.says("5:6\n5:6\n5:6\n"),
        },
        Case {
            name: "owners_on_disk",
            levels: &[Level::Root, Level::Rootless],
            script: "touch /f; chown 33:44 /f; mknod /p p",
            set_up: nothing,
            check: |ran| {
                ran.says("");
                let about = fs::metadata(ran.changes().join("f")).unwrap();
                assert_eq!((about.uid(), about.gid()), (33, 44));
                assert!(ran.outcome().owners.is_empty());
            },
        },
        Case {
            name: "cancel",
            levels: ALL,
            script: "(setsid sleep 7000 &); echo started; sleep 7000",
            set_up: nothing,
            check: |ran| {
                assert!(ran.outcome().cancelled);
                assert_eq!(ran.outcome().code, 137);
                assert!(ran.elapsed < Duration::from_mins(1));
                assert_eq!(ran.changed(), Vec::<String>::new());
            },
        },
    ]
}

/// Mounts that have to do with a folder: others come and go while the machine does other things.
fn mounts(folder: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let folder = folder.to_str().expect("UTF-8");
    table.lines().filter(|line| line.contains(folder)).collect::<Vec<_>>().join("\n")
}

impl Case {
    pub(crate) fn run(&self, level: Level) -> ExitCode {
        let place = Place::new();
        // Above the fixture's folder: single ids can only be entered with one thread.
        let mut step = place.step(level, self.script);
        (self.set_up)(&place, &mut step);
        if let Err(error) = ovenbird_sandbox::enter(level) {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
        let folder = place.folder.path().to_owned();
        let (before, mounts_before, files_before) = (listing(&place.path("lower")), mounts(&folder), open_files());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut mounts_during = mounts_before.clone();
        let cancel = Arc::new(AtomicBool::new(false));
        let start = Instant::now();
        let result = ovenbird_sandbox::run(
            level,
            &step,
            &mut |stream, bytes| {
                mounts_during = mounts(&folder);
                if self.name == "cancel" && bytes == b"started\n" {
                    cancel.store(true, Ordering::Relaxed);
                }
                match stream {
                    Stream::Stdout => out.extend_from_slice(bytes),
                    Stream::Stderr => err.extend_from_slice(bytes),
                }
            },
            &cancel,
        );
        let elapsed = start.elapsed();
        assert_eq!(open_files(), files_before, "descriptors are left open");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let mounts = (mounts_before, mounts_during, mounts(&folder));
        let ran = Ran { level, place, result, out: text(out), err: text(err), elapsed, before, mounts };
        (self.check)(&ran);
        ExitCode::SUCCESS
    }
}

/// A step that runs until its engine is killed.
pub(crate) fn run_for_ever(level: Level) -> ExitCode {
    let mark = std::env::var(MARK).unwrap_or_default();
    let place = Place::new();
    let mut step = place.step(level, &format!("/inside >/dev/null; (setsid sleep {mark} &); (sleep 1; echo running) & sleep {mark}"));
    crate::raw::asking_not_to_be_traced(&place, &mut step, &mark);
    // The killed cannot clean up: the parent does.
    println!("{}", place.folder.path().display());
    if ovenbird_sandbox::enter(level).is_ok() {
        let _ = ovenbird_sandbox::run(level, &step, &mut |_, bytes| print!("{}", String::from_utf8_lossy(bytes)), &AtomicBool::new(false));
    }
    ExitCode::FAILURE
}
