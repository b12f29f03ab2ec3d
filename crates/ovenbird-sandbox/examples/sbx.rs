//! Tries a level by hand: `sbx LEVEL (dir ROOT | overlay SCRATCH LOWER...) -- PROGRAM ARGUMENT...`
//!
//! Options through the environment: `SBX_UID`, `SBX_GID`, `SBX_NET=none`, `SBX_MEMORY`, `SBX_CPUS`, `SBX_INSECURE`, `SBX_REPEAT`,
//! `SBX_SECRET=target`, `SBX_BIND=source:target`, `SBX_PROBE=folder` (prints the probe and ends), `SBX_OWNERS=file` (owners in the lower
//! layers: lines of user, group and path).
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use ovenbird_sandbox::{Level, Limits, Mount, MountSource, Network, Root, Step, StepUser, Stream};

fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    if let Some(folder) = variable("SBX_PROBE") {
        let start = Instant::now();
        let probe = ovenbird_sandbox::probe::probe_all(Path::new(&folder));
        println!("{probe:#?}\n{:?}", start.elapsed());
        let start = Instant::now();
        println!("probe(): {:?} in {:?}", ovenbird_sandbox::probe::probe(Path::new(&folder)).chosen, start.elapsed());
        return ExitCode::SUCCESS;
    }
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Some(split) = args.iter().position(|arg| arg == "--").filter(|at| *at >= 3) else {
        eprintln!("sbx LEVEL (dir ROOT | overlay SCRATCH LOWER...) -- PROGRAM ARGUMENT...");
        return ExitCode::from(2);
    };
    let Some(level) = Level::ALL.into_iter().find(|level| args[0] == level.name()) else {
        eprintln!("no level {}", args[0].display());
        return ExitCode::from(2);
    };
    let overlay = args[1] == "overlay";
    let folder = PathBuf::from(&args[2]);
    let base = if overlay { folder.clone() } else { folder.parent().map(Path::to_owned).unwrap_or_default() };
    if let Err(error) = ovenbird_sandbox::enter(level) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let number = |name: &str| variable(name).and_then(|value| value.parse().ok());
    let mut mounts = Vec::new();
    if let Some(target) = variable("SBX_SECRET") {
        let source = MountSource::Secret { content: b"secret\n".to_vec(), mode: 0o400, uid: 0, gid: 0 };
        mounts.push(Mount { target: target.into(), source, read_only: true });
    }
    if let Some((source, target)) = variable("SBX_BIND").as_deref().and_then(|value| value.split_once(':')) {
        mounts.push(Mount { target: target.into(), source: MountSource::Bind(source.into()), read_only: false });
    }
    let mut lower_owners = Vec::new();
    if let Some(list) = variable("SBX_OWNERS") {
        let Ok(list) = std::fs::read_to_string(&list) else {
            eprintln!("{list} cannot be read");
            return ExitCode::FAILURE;
        };
        lower_owners.extend(list.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ' ');
            let (uid, gid) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            Some((PathBuf::from(parts.next()?), uid, gid, None))
        }));
    }
    let mut code = 0;
    for turn in 0..number("SBX_REPEAT").unwrap_or(1) {
        let scratch = base.join(format!("scratch-{turn}"));
        let (upper, work) = (base.join(format!("upper-{turn}")), base.join(format!("work-{turn}")));
        let made: &[&PathBuf] = if overlay { &[&scratch, &upper, &work] } else { &[&scratch] };
        for folder in made {
            if let Err(error) = std::fs::create_dir_all(folder) {
                eprintln!("{}: {error}", folder.display());
                return ExitCode::FAILURE;
            }
        }
        let root = if overlay {
            Root::Overlay { lowers: args[3..split].iter().map(PathBuf::from).collect(), upper, work }
        } else {
            Root::Dir(folder.clone())
        };
        let step = Step {
            root,
            args: args[split + 1..].to_vec(),
            env: vec![
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
                "HOME=/root".into(),
                "DEBIAN_FRONTEND=noninteractive".into(),
            ],
            cwd: "/".into(),
            user: StepUser { uid: number("SBX_UID").unwrap_or(0) as u32, gid: number("SBX_GID").unwrap_or(0) as u32, groups: vec![] },
            hostname: "sbx".into(),
            network: if variable("SBX_NET").as_deref() == Some("none") { Network::None } else { Network::Host },
            mounts: mounts.clone(),
            hosts: vec![],
            dns: vec![],
            limits: Limits {
                memory: number("SBX_MEMORY"),
                cpus: variable("SBX_CPUS").and_then(|value| value.parse().ok()),
                ..Limits::default()
            },
            insecure: variable("SBX_INSECURE").is_some(),
            stdin: vec![],
            scratch,
            lower_owners: lower_owners.clone(),
            mount_owners: Vec::new(),
        };
        let start = Instant::now();
        let mut show = |stream: Stream, bytes: &[u8]| {
            // A closed terminal ends the example anyway.
            let _ = match stream {
                Stream::Stdout => std::io::stdout().write_all(bytes),
                Stream::Stderr => std::io::stderr().write_all(bytes),
            };
        };
        match ovenbird_sandbox::run(level, &step, &mut show, &AtomicBool::new(false)) {
            Ok(outcome) => {
                eprintln!("[{:?}] {outcome:?}", start.elapsed());
                code = outcome.code;
            }
            Err(error) => {
                eprintln!("[{:?}] {error}", start.elapsed());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::from(code as u8)
}
