//! `ovenbird doctor`.

use std::fmt::Write as _;

use clap::Args;
use ovenbird::choice::{On, Probe};
use ovenbird::docker_engine::DockerEngine;
use ovenbird::launch::kubernetes::{self, KubernetesPlace};
use ovenbird::launch::{PrefectLauncher, PrefectPlace};
use ovenbird::{Error, Kind};
use ovenbird_sandbox::Level;
use serde_json::{Value, json};

use crate::place::find_docker;
use crate::session::Session;

/// Show what this machine allows, and what is missing for more. Fails with code 8 when no step can run here.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// JSON
    #[arg(long)]
    json: bool,
    /// Look at this place instead of this machine: `kubernetes[,KEY=VALUE]...`, and whether a build may do there what it needs
    #[arg(long, value_name = "PLACE")]
    on: Option<On>,
}

/// One thing that was looked at.
struct Finding {
    what: &'static str,
    good: bool,
    detail: String,
}

pub(crate) fn run(args: &DoctorArgs, session: &Session) -> Result<(), Error> {
    match &args.on {
        None => {}
        Some(On::Kubernetes(place)) => return cluster(place, args.json, session),
        Some(other) => {
            return Err(Error::refused(
                &format!("doctor --on {other}"),
                "only --on kubernetes is asked; the others are in `ovenbird doctor`",
            ));
        }
    }
    let state = state(session);
    let probe = ovenbird_sandbox::probe::probe_all(&session.settings.root);
    let places = places(session, probe.chosen);
    let findings = [state, docker(session), program(session, "newuidmap"), program(session, "newgidmap")];
    let text = if args.json {
        let findings: serde_json::Map<String, Value> =
            findings.iter().map(|f| (f.what.to_owned(), json!({"ok": f.good, "detail": f.detail}))).collect();
        super::json(&json!({
            "version": 1,
            "ovenbird": env!("CARGO_PKG_VERSION"),
            "root": session.settings.root,
            "settings": session.settings.files,
            "sandbox": probe,
            "findings": findings,
            "places": places.iter().map(|f| json!({"place": f.what, "usable": f.good, "detail": f.detail})).collect::<Vec<_>>(),
        }))?
    } else {
        let mut text = String::new();
        for status in &probe.levels {
            let mark = if status.usable { "yes" } else { "no" };
            let chosen = if probe.chosen == Some(status.level) { "  (used)" } else { "" };
            let _ = writeln!(text, "isolation {:10} {mark}{chosen}", status.level.name());
            let _ = writeln!(text, "    {}", status.level.description());
            if status.usable && !status.overlay && !matches!(status.level, Level::Chroot | Level::Traced) {
                let _ = writeln!(text, "    No overlay mounts below the state directory: each step copies its root, which is slower.");
            }
            if status.level == Level::Traced && status.usable && probe.chosen.is_none() {
                let _ = writeln!(
                    text,
                    "    Not used by itself outside a container: a step could reach all that you can. --isolation-level traced takes it."
                );
            }
            for missing in &status.missing {
                let _ = writeln!(text, "    missing: {missing}");
            }
        }
        for finding in &findings {
            let _ = writeln!(text, "{:20} {}  {}", finding.what, if finding.good { "yes" } else { "no" }, finding.detail);
        }
        for place in &places {
            let _ = writeln!(text, "--on {:16} {}  {}", place.what, if place.good { "yes" } else { "no" }, place.detail);
        }
        text
    };
    crate::print(&text)?;
    if probe.chosen.is_none() {
        return Err(Error::new(Kind::Sandbox, "no isolation level works here: only Dockerfiles without RUN can be built"));
    }
    Ok(())
}

/// Whether a build may do in a cluster what it needs.
fn cluster(place: &KubernetesPlace, as_json: bool, session: &Session) -> Result<(), Error> {
    let found = kubernetes::examine(place, &session.settings.kubernetes, &session.environment)?;
    let allowed = found.access.iter().all(|(_, allowed)| *allowed);
    let text = if as_json {
        super::json(&json!({
            "version": 1,
            "ovenbird": env!("CARGO_PKG_VERSION"),
            "server": found.server,
            "namespace": found.namespace,
            "security": found.security.to_string(),
            "image": found.image,
            "access": found.access.iter().map(|(access, allowed)| json!({
                "verb": access.verb, "group": access.group, "resource": access.resource, "allowed": allowed,
            })).collect::<Vec<_>>(),
            "usable": allowed && found.image.is_some(),
        }))?
    } else {
        let mut text = format!("Kubernetes API        yes  {}, namespace {}\n", found.server, found.namespace);
        let _ = writeln!(text, "pod security          {}", found.security);
        let image = found
            .image
            .as_deref()
            .map_or_else(|| ("no", "not named: image=NAME or the setting [kubernetes] image"), |image| ("yes", image));
        let _ = writeln!(text, "image                 {}  {}", image.0, image.1);
        for (access, allowed) in &found.access {
            let _ = writeln!(text, "{:6} {:14} {}", access.verb, access.resource, if *allowed { "yes" } else { "no" });
        }
        if !allowed {
            let _ =
                write!(text, "\nA role with these rules is missing (deploy/kubernetes has it):\nrules:\n{}", kubernetes::access::rules());
        }
        text
    };
    crate::print(&text)?;
    if allowed {
        return Ok(());
    }
    let missing: Vec<String> =
        found.access.iter().filter(|(_, allowed)| !allowed).map(|(access, _)| format!("{} {}", access.verb, access.resource)).collect();
    Err(Error::new(Kind::Driver, format!("builds may not run in the namespace {}: not allowed: {}", found.namespace, missing.join(", "))))
}

/// Each place of `--on`. Other machines are not asked.
fn places(session: &Session, level: Option<Level>) -> Vec<Finding> {
    let finding = |what, good, detail: String| Finding { what, good, detail };
    let docker = find_docker(session);
    let own = match level {
        Some(level) => format!("isolation level {}", level.name()),
        None => "no isolation level works, so no step can run".into(),
    };
    let in_container = match &docker {
        Ok(docker) => format!("the Docker Engine at {docker}"),
        Err(error) => error.clone(),
    };
    let hosts: Vec<String> = session.settings.pool.iter().map(ToString::to_string).collect();
    let pool = if hosts.is_empty() { "no hosts in the setting [pool]".into() } else { format!("not tried: {}", hosts.join(", ")) };
    vec![
        finding("here", level.is_some(), own.clone()),
        finding("process", level.is_some(), own),
        finding("container", docker.is_ok(), in_container.clone()),
        finding("container,socket", docker.is_ok(), in_container),
        finding("pool", !hosts.is_empty(), pool),
        in_cluster(session),
        prefect(session),
    ]
}

/// Whether there is a cluster.
fn in_cluster(session: &Session) -> Finding {
    let mut found = Probe::of_environment(&session.environment).elsewhere;
    found.retain(|place| place.contains("Kubernetes"));
    let detail = if found.is_empty() {
        "no kubeconfig, and this is no pod".into()
    } else {
        format!("not tried: {}; `ovenbird doctor --on kubernetes` asks it", found.join(", "))
    };
    Finding { what: "kubernetes", good: !found.is_empty(), detail }
}

/// Whether a Prefect server would take builds.
fn prefect(session: &Session) -> Finding {
    let launcher = PrefectLauncher::new(&PrefectPlace::default(), &session.settings, &session.environment);
    let (good, detail) = match launcher.and_then(|launcher| launcher.look()) {
        Ok(found) => (true, found),
        Err(error) => (false, error.to_string()),
    };
    Finding { what: "prefect", good, detail }
}

/// Makes the state directory and a file in it.
fn state(session: &Session) -> Finding {
    let root = &session.settings.root;
    let probe = root.join(format!(".doctor-{}", std::process::id()));
    let tried = std::fs::create_dir_all(root).and_then(|()| std::fs::write(&probe, b"")).and_then(|()| std::fs::remove_file(&probe));
    let detail = match &tried {
        Ok(()) => root.display().to_string(),
        Err(error) => format!("{}: {error}; give another one with --root DIR", root.display()),
    };
    Finding { what: "state directory", good: tried.is_ok(), detail }
}

fn docker(session: &Session) -> Finding {
    let tried = DockerEngine::new(&session.settings.docker).and_then(|d| Ok((d.reach()?.engine, d)));
    let (good, detail) = match tried {
        Ok((version, docker)) => (true, format!("version {version} at {docker}")),
        Err(error) => (false, format!("{error} (needed for --load and --builder docker)")),
    };
    Finding { what: "Docker Engine", good, detail }
}

fn program(session: &Session, name: &'static str) -> Finding {
    match session.environment.find_program(name) {
        Some(path) => Finding { what: name, good: true, detail: path.display().to_string() },
        None => Finding { what: name, good: false, detail: "not on PATH; Debian: install uidmap (needed for the level rootless)".into() },
    }
}
