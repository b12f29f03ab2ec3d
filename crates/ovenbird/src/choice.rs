//! Where a build runs: what `--on` can say.

use std::fmt;
use std::str::FromStr;

use crate::launch::{ContainerPlace, Host};
use crate::request::ParseValueError;

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
}

impl FromStr for On {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "here" => Self::Here,
            "process" => Self::Process,
            "pool" => Self::Pool,
            "container" => Self::Container(ContainerPlace::default()),
            _ if text.starts_with("container,") => Self::Container(container(text)?),
            _ if text.starts_with("ssh://") => Self::Ssh(text.split(',').map(str::parse).collect::<Result<_, _>>()?),
            _ => {
                let reason = format!(
                    "{text:?} is no place for a build: expected auto, here, process, container[,socket][,image=NAME], pool or ssh://HOST[,ssh://HOST]"
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
            Some(("image", name)) => {
                name.parse::<ovenbird_oci::Reference>().map_err(|error| wrong(error.to_string()))?;
                place.image = Some(name.into());
            }
            _ => return Err(wrong(format!("{part:?} is not known; expected privileged, socket or image=NAME"))),
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
            Self::Container(ContainerPlace { socket, image }) => {
                f.write_str(if *socket { "container,socket" } else { "container" })?;
                image.iter().try_for_each(|image| write!(f, ",image={image}"))
            }
            Self::Ssh(hosts) => f.write_str(&hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            Self::Pool => f.write_str("pool"),
        }
    }
}
