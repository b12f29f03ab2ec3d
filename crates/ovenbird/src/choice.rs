//! Where a build runs and what builds it: what `--on` can say, and what `auto` comes to.
//!
//! [`choose`] is the table of `docs/guides/places.md`, a function of what was found out about the machine ([`Probe`]). It looks at nothing
//! by itself.

use std::fmt;
use std::str::FromStr;

use crate::builder::BuilderKind;
use crate::error::{Error, Kind};
use crate::launch::{ContainerPlace, Host, KubernetesPlace, PrefectPlace};
use crate::request::ParseValueError;
use crate::settings::Environment;

/// A place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum On {
    /// The best that this machine has.
    #[default]
    Auto,
    /// In this process.
    Here,
    /// In a process of its own on this machine.
    Process,
    /// In a container of the Docker Engine.
    Container(ContainerPlace),
    /// On one of these machines.
    Ssh(Vec<Host>),
    /// On one of the machines of the setting `[pool]`.
    Pool,
    /// In a pod of a Kubernetes cluster.
    Kubernetes(Box<KubernetesPlace>),
    /// As a flow run of a Prefect server.
    Prefect(PrefectPlace),
}

impl FromStr for On {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "here" => Self::Here,
            "process" => Self::Process,
            "pool" => Self::Pool,
            "kubernetes" => Self::Kubernetes(Box::default()),
            "prefect" => Self::Prefect(PrefectPlace::default()),
            _ if text.starts_with("prefect,") => Self::Prefect(PrefectPlace::parse(&text["prefect,".len()..])?),
            "container" => Self::Container(ContainerPlace::default()),
            _ if text.starts_with("container,") => Self::Container(container(text)?),
            _ if text.starts_with("kubernetes,") => {
                Self::Kubernetes(Box::new(KubernetesPlace::parse(text.strip_prefix("kubernetes,").unwrap_or_default())?))
            }
            _ if text.starts_with("ssh://") => Self::Ssh(text.split(',').map(str::parse).collect::<Result<_, _>>()?),
            _ => {
                let reason = format!(
                    "{text:?} is no place for a build: expected auto, here, process, container[,socket][,image=NAME], pool, kubernetes[,KEY=VALUE], prefect[,pool=NAME] or ssh://HOST[,ssh://HOST]"
                );
                return Err(ParseValueError { reason });
            }
        })
    }
}

/// `container[,privileged|,socket][,image=NAME]`.
fn container(text: &str) -> Result<ContainerPlace, ParseValueError> {
    let wrong = |why: String| ParseValueError { reason: format!("{text:?} is no place for a build: {why}") };
    let (mut place, mut rights) = (ContainerPlace::default(), None);
    for part in text.split(',').skip(1) {
        match part.split_once('=') {
            None if matches!(part, "privileged" | "socket") && rights.is_none_or(|said| said == part) => rights = Some(part),
            None if matches!(part, "privileged" | "socket") => return Err(wrong("it is either privileged or has the socket".into())),
            None if part == "buildroot" => drop(place.buildroot.get_or_insert_default()),
            Some(("buildroot", registry)) if ovenbird_oci::reference::is_host(registry) => {
                place.buildroot.get_or_insert_default().push(registry.into());
            }
            Some(("image", name)) => {
                name.parse::<ovenbird_oci::Reference>().map_err(|error| wrong(error.to_string()))?;
                place.image = Some(name.into());
            }
            _ => return Err(wrong(format!("{part:?} is not known; expected privileged, socket, image=NAME or buildroot[=REGISTRY]"))),
        }
    }
    place.socket = rights == Some("socket");
    Ok(place)
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Here => f.write_str("here"),
            Self::Process => f.write_str("process"),
            Self::Container(ContainerPlace { socket, image, buildroot }) => {
                f.write_str(if *socket { "container,socket" } else { "container" })?;
                if buildroot.as_ref().is_some_and(Vec::is_empty) {
                    f.write_str(",buildroot")?;
                }
                buildroot.iter().flatten().try_for_each(|registry| write!(f, ",buildroot={registry}"))?;
                image.iter().try_for_each(|image| write!(f, ",image={image}"))
            }
            Self::Ssh(hosts) => f.write_str(&hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            Self::Pool => f.write_str("pool"),
            Self::Kubernetes(place) => write!(f, "kubernetes{place}"),
            Self::Prefect(place) => place.fmt(f),
        }
    }
}

/// What was found out about this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Probe {
    /// The isolation level at which steps can run here.
    pub level: Option<&'static str>,
    /// The Docker Engine that answered, and what led there; or why none did. Only looked for where it matters.
    pub docker: Option<Result<String, String>>,
    /// Places of builds that this version does not know, and what led there.
    pub elsewhere: Vec<&'static str>,
}

impl Probe {
    /// What variables and files say, without asking anybody.
    pub fn of_environment(environment: &Environment) -> Self {
        let set = |name: &str| environment.get(name).is_some_and(|value| !value.is_empty());
        let kubeconfig = set("KUBECONFIG") || environment.home().is_some_and(|home| home.join(".kube/config").is_file());
        let found = [
            (set("KUBERNETES_SERVICE_HOST"), "the Kubernetes cluster around this pod (KUBERNETES_SERVICE_HOST)"),
            (kubeconfig, "the Kubernetes cluster of the kubeconfig"),
            (set("PREFECT_API_URL"), "the Prefect server of PREFECT_API_URL"),
        ];
        Self { elsewhere: found.into_iter().filter(|(found, _)| *found).map(|(_, what)| what).collect(), ..Self::default() }
    }

    /// Does it matter whether a Docker Engine answers?
    pub fn wants_docker(&self, on: &On, builder: BuilderKind) -> bool {
        match on {
            On::Auto | On::Here => builder != BuilderKind::Docker && self.level.is_none(),
            On::Process | On::Container(_) | On::Ssh(_) | On::Pool | On::Kubernetes(_) | On::Prefect(_) => false,
        }
    }
}

/// Where, what, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Never [`On::Auto`].
    pub on: On,
    /// Here, never [`BuilderKind::Auto`]; elsewhere that place may choose.
    pub builder: BuilderKind,
    /// One line.
    pub reason: String,
}

/// The table.
pub fn choose(on: &On, builder: BuilderKind, probe: &Probe) -> Result<Chosen, Error> {
    use BuilderKind::{Auto, Docker, Engine};
    let chosen = |on: On, builder, reason: String| Ok(Chosen { on, builder, reason });
    match (on, builder) {
        (On::Container(place), said) => {
            let own = if place.socket { Docker } else { Engine };
            if said != Auto && said != own {
                return Err(Error::new(Kind::Usage, format!("--builder {said} does not go with --on {on}"))
                    .hint("--on container has Ovenbird's own engine, --on container,socket the Docker Engine"));
            }
            chosen(on.clone(), own, "asked for".into())
        }
        (On::Kubernetes(_), Docker) => Err(Error::new(Kind::Usage, "--builder docker does not go with --on kubernetes")
            .hint("nodes have no Docker Engine, and a pod that could use one would own its node")),
        (On::Prefect(_), Docker) => Err(Error::new(Kind::Usage, format!("--builder {builder} does not go with --on {on}"))
            .hint("a flow run builds with Ovenbird's own engine")),
        (On::Kubernetes(_) | On::Prefect(_), Auto | Engine) => chosen(on.clone(), Engine, "asked for".into()),
        (On::Process | On::Ssh(_) | On::Pool, said) => chosen(on.clone(), said, "asked for".into()),
        (On::Auto | On::Here, Docker) => chosen(On::Here, Docker, "asked for".into()),
        (On::Auto | On::Here, Auto | Engine) => match (probe.level, &probe.docker) {
            (Some(level), _) => chosen(On::Here, Engine, format!("steps can run on this machine, isolation level {level}")),
            (None, Some(Ok(docker))) if builder == Auto => {
                chosen(On::Here, Docker, format!("no isolation level works on this machine, and the Docker Engine at {docker} answers"))
            }
            (None, Some(Ok(docker))) if *on == On::Auto => {
                let reason =
                    format!("no isolation level works on this machine, and the Docker Engine at {docker} can give a container its rights");
                chosen(On::Container(ContainerPlace::default()), Engine, reason)
            }
            (None, docker) => {
                let mut reason = "no isolation level works on this machine, so only Dockerfiles without RUN can be built".to_owned();
                if let Some(Err(why)) = docker {
                    reason.extend(["; ", why]);
                }
                for place in &probe.elsewhere {
                    let how = if place.contains("Kubernetes") { "kubernetes" } else { "prefect" };
                    reason.extend(["; ", place, " is not used unasked (--on ", how, ")"]);
                }
                chosen(On::Here, Engine, reason)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_as_they_are_written() {
        for (text, expect) in [
            ("auto", "auto"),
            ("here", "here"),
            ("process", "process"),
            ("pool", "pool"),
            ("container", "container"),
            ("container,privileged", "container"),
            ("container,socket", "container,socket"),
            ("container,image=r.test/a:1,socket", "container,socket,image=r.test/a:1"),
            ("container,buildroot", "container,buildroot"),
            ("container,buildroot=r.test:5000,buildroot=s.test", "container,buildroot=r.test:5000,buildroot=s.test"),
            ("ssh://a,ssh://me@b:2?slots=3", "ssh://a,ssh://me@b:2"),
            ("container,socket,privileged", "! \"container,socket,privileged\" is no place for a build: it is either"),
            ("container,image=A", "! \"container,image=A\" is no place for a build: "),
            ("container,x", "! \"container,x\" is no place for a build: \"x\" is not known"),
            ("kubernetes", "kubernetes"),
            ("kubernetes,namespace=ci,limits.memory=1Gi", "kubernetes,namespace=ci,limits.memory=1Gi"),
            ("kubernetes,gpu=1", "! \"kubernetes,gpu=1\" is no place for a build: \"gpu=1\" is not known"),
            ("prefect", "prefect"),
            ("prefect,queue=q,pool=a b", "prefect,pool=a b,queue=q"),
            ("prefect,address=http://h/api,image=r.test/a:1", "prefect,address=http://h/api,image=r.test/a:1"),
            ("prefect,pol=x", "! --on prefect has no \"pol\""),
            ("prefect,pool=", "! --on prefect: pool has no value"),
            ("ssh://a,b", "! \"b\" is no host for builds"),
            ("moon", "! \"moon\" is no place for a build: expected auto"),
            ("", "! "),
        ] {
            let got = text.parse::<On>().map_or_else(|error| format!("! {error}"), |on| on.to_string());
            assert!(got.starts_with(expect), "{text}: {got}");
        }
    }

    /// Every row of the table in the guide, over everything that can be found: the guide has the same rows.
    #[test]
    fn the_table_of_the_guide() {
        let guide = include_str!("../../../docs/guides/places.md");
        let rows: Vec<Vec<&str>> = guide
            .lines()
            .skip_while(|line| !line.starts_with("| `--on` | `--builder` |"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect())
            .collect();
        assert!(rows.len() >= 10, "{rows:?}");
        let of = |cell: &str| match cell {
            "yes" => vec![true],
            "no" => vec![false],
            "any" => vec![true, false],
            other => panic!("{other}"),
        };
        let mut seen = std::collections::BTreeSet::new();
        for row in &rows {
            let [on, builder, engine, docker, where_, what, reason] = row[..] else { panic!("{row:?}") };
            let (said, kind): (On, BuilderKind) = (on.parse().unwrap(), builder.parse().unwrap());
            for (engine, docker) in of(engine).into_iter().flat_map(|engine| of(docker).into_iter().map(move |docker| (engine, docker))) {
                assert!(seen.insert((on, builder, engine, docker)), "{row:?} is there twice");
                for elsewhere in [vec![], vec!["the Kubernetes cluster of the kubeconfig", "the Prefect server of PREFECT_API_URL"]] {
                    let mut probe = Probe { level: engine.then_some("root"), docker: None, elsewhere: elsewhere.clone() };
                    if probe.wants_docker(&said, kind) {
                        probe.docker = Some(if docker { Ok("unix:///d.sock".into()) } else { Err("none answers".into()) });
                    }
                    let got = choose(&said, kind, &probe);
                    match (where_, got) {
                        ("refused", Err(error)) => assert!(error.to_string().contains(what), "{row:?}: {error}"),
                        (_, Ok(got)) => {
                            assert_eq!((got.on.to_string().as_str(), got.builder.to_string().as_str()), (where_, what), "{row:?}");
                            assert!(got.reason.contains(reason), "{row:?}: {}", got.reason);
                            // Where nothing better is found, what is not supported is named.
                            if got.reason.contains("only Dockerfiles without RUN") {
                                assert!(elsewhere.iter().all(|place| got.reason.contains(place)), "{}", got.reason);
                                assert!(got.reason.contains("none answers") || said == On::Here || engine || docker, "{}", got.reason);
                            }
                        }
                        (_, Err(error)) => panic!("{row:?}: {error}"),
                    }
                }
            }
        }
        for on in ["auto", "here"] {
            for builder in ["auto", "engine", "docker"] {
                for (engine, docker) in [(true, true), (true, false), (false, true), (false, false)] {
                    assert!(seen.contains(&(on, builder, engine, docker)), "{on} {builder} {engine} {docker} is not in the guide");
                }
            }
        }
    }

    #[test]
    fn what_the_environment_says() {
        let of = |name: &str| {
            let environment = Environment::fixed([(name.to_owned(), "x".to_owned())].into(), "/", None);
            Probe::of_environment(&environment).elsewhere
        };
        for (name, expect) in
            [("KUBERNETES_SERVICE_HOST", "around this pod"), ("KUBECONFIG", "of the kubeconfig"), ("PREFECT_API_URL", "the Prefect server")]
        {
            assert!(of(name).len() == 1 && of(name)[0].contains(expect), "{name}");
        }
        assert!(of("HOME").is_empty());
    }
}
