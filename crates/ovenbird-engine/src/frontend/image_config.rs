//! What each instruction does to the image config.
//! Source: Docker image spec 1.3; empty lists are left out, as Go's `omitempty` does.

use std::collections::BTreeMap;

use ovenbird_dockerfile::ast::{Command, Healthcheck};
use ovenbird_dockerfile::duration::parse_nanos;
use ovenbird_oci::image::{HealthConfig, RootFs, RunConfig};
use ovenbird_oci::{ImageConfig, Platform};

use super::scope::split_pair;

/// `PATH` of an image that sets none.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most ports that one `EXPOSE` may name.
const MAX_PORTS: usize = 1 << 18;

/// Config of `FROM scratch`.
pub(super) fn empty(platform: &Platform) -> ImageConfig {
    let windows = platform.os == "windows";
    let config = RunConfig {
        env: if windows { vec![] } else { vec![format!("PATH={DEFAULT_PATH}")] },
        working_dir: if windows { "\\".into() } else { "/".into() },
        ..RunConfig::default()
    };
    ImageConfig {
        architecture: platform.architecture.clone(),
        os: platform.os.clone(),
        variant: platform.variant.clone(),
        os_version: platform.os_version.clone(),
        config,
        ..ImageConfig::default()
    }
}

/// What a child keeps of its base image's config: the fields of the image spec, no times, no layers, no history.
pub(super) fn inherited(base: &ImageConfig) -> ImageConfig {
    let mut config = base.clone();
    config.created = None;
    config.history = Vec::new();
    config.rootfs = RootFs::default();
    config.other.retain(|key, _| key == "os.features");
    config.config.other.retain(|key, _| key == "StopTimeout");
    config
}

/// Where in an image's environment each variable is. Entries nobody sets again stay as the base image wrote them.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(BTreeMap<String, usize>);

impl Places {
    pub(super) fn of(env: &[String]) -> Self {
        // The first of equal names counts.
        Self(env.iter().enumerate().rev().map(|(at, pair)| (split_pair(pair).0.to_owned(), at)).collect())
    }

    /// Sets one variable, in its old place when it was set before.
    pub(super) fn set(&mut self, env: &mut Vec<String>, name: &str, value: &str) {
        let pair = format!("{name}={value}");
        if let Some(&at) = self.0.get(name) {
            env[at] = pair;
        } else {
            self.0.insert(name.to_owned(), env.len());
            env.push(pair);
        }
    }
}

/// Arguments of a command; a shell command goes behind the image's shell.
pub(super) fn arguments(command: &Command, config: &ImageConfig) -> Vec<String> {
    match command {
        Command::Exec(args) => args.clone(),
        Command::Shell(text) => with_shell(config, text),
    }
}

/// The image's shell and the text for it.
pub(super) fn with_shell(config: &ImageConfig, text: &str) -> Vec<String> {
    let default: &[&str] = if config.os == "windows" { &["cmd", "/S", "/C"] } else { &["/bin/sh", "-c"] };
    let mut args = match &config.config.shell {
        Some(shell) if !shell.is_empty() => shell.clone(),
        _ => default.iter().map(|&word| word.to_owned()).collect(),
    };
    args.push(text.to_owned());
    args
}

/// An empty list is the same as none.
pub(super) fn non_empty(items: Vec<String>) -> Option<Vec<String>> {
    if items.is_empty() { None } else { Some(items) }
}

/// `HEALTHCHECK` as config.
pub(super) fn health(check: &Healthcheck) -> Result<HealthConfig, String> {
    let Healthcheck::Cmd { command, interval, timeout, start_period, start_interval, retries } = check else {
        return Ok(HealthConfig { test: vec!["NONE".into()], ..HealthConfig::default() });
    };
    let test = match command {
        Command::Shell(text) => vec!["CMD-SHELL".into(), text.clone()],
        Command::Exec(args) => std::iter::once("CMD".to_owned()).chain(args.iter().cloned()).collect(),
    };
    let time = |flag: &str, value: &Option<String>| match value.as_deref() {
        None | Some("") => Ok(0),
        Some(value) => match parse_nanos(value) {
            Err(reason) => Err(format!("--{flag}: {reason}")),
            Ok(n) if n != 0 && n < 1_000_000 => Err(format!("--{flag}={value} cannot be less than 1ms")),
            Ok(n) => Ok(n),
        },
    };
    let retries = match retries.as_deref() {
        None | Some("") => 0,
        Some(value) => value
            .parse::<i64>()
            .ok()
            .filter(|n| (0..=i64::from(i32::MAX)).contains(n))
            .ok_or_else(|| format!("--retries={value} must be a whole number and cannot be negative"))?,
    };
    Ok(HealthConfig {
        test,
        interval: time("interval", interval)?,
        timeout: time("timeout", timeout)?,
        start_period: time("start-period", start_period)?,
        start_interval: time("start-interval", start_interval)?,
        retries,
    })
}

/// Expands port ranges: `80-81/TCP` gives `80/tcp` and `81/tcp`. A host part (`ip:host:container`) is read and dropped.
pub(super) fn ports(specs: &[String]) -> Result<Vec<String>, String> {
    let mut ports = Vec::new();
    for spec in specs {
        let mut parts = spec.rsplitn(3, ':');
        let container = parts.next().unwrap_or_default();
        let (host_port, address) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (container, protocol) = container.split_once('/').unwrap_or((container, ""));
        if container.is_empty() {
            return Err(format!("no port specified: {spec}<empty>"));
        }
        let protocol = match protocol.to_lowercase().as_str() {
            "" | "tcp" => "tcp",
            "udp" => "udp",
            "sctp" => "sctp",
            other => return Err(format!("invalid proto: {other}")),
        };
        let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        if !bare.is_empty() && bare.parse::<std::net::IpAddr>().is_err() {
            return Err(format!("invalid IP address: {bare}"));
        }
        let (start, end) = port_range(container).ok_or_else(|| format!("invalid containerPort: {container}"))?;
        if !host_port.is_empty() {
            let (host_start, host_end) = port_range(host_port).ok_or_else(|| format!("invalid hostPort: {host_port}"))?;
            if end - start != host_end - host_start && end != start {
                return Err(format!("invalid ranges specified for container and host Ports: {container} and {host_port}"));
            }
        }
        ports.extend((start..=end).map(|port| format!("{port}/{protocol}")));
        if ports.len() > MAX_PORTS {
            return Err(format!("more than {MAX_PORTS} ports in one EXPOSE: name each port once"));
        }
    }
    // In this order they stand in the history.
    ports.sort_unstable();
    Ok(ports)
}

fn port_range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| if text.starts_with('+') { None } else { text.parse::<u16>().ok() };
    match text.split_once('-') {
        None => number(text).map(|port| (port, port)),
        Some((start, end)) => number(start).zip(number(end)).filter(|(start, end)| start <= end),
    }
}

/// Is it a signal that Linux knows, by number or by name, with or without `SIG`?
pub(super) fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<i32>() {
        return number != 0;
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    const NAMES: &str = " ABRT ALRM BUS CHLD CLD CONT FPE HUP ILL INT IO IOT KILL PIPE POLL PROF PWR QUIT SEGV STKFLT STOP SYS TERM TRAP TSTP TTIN \
                         TTOU URG USR1 USR2 VTALRM WINCH XCPU XFSZ RTMIN RTMAX ";
    let known = !name.is_empty() && !name.contains(' ') && NAMES.contains(&format!(" {name} "));
    let offset = |prefix: &str, most: u8| {
        name.strip_prefix(prefix)
            .is_some_and(|n| n.len() <= 2 && !n.starts_with('0') && n.parse::<u8>().is_ok_and(|n| (1..=most).contains(&n)))
    };
    known || offset("RTMIN+", 15) || offset("RTMAX-", 14)
}

/// Platform fields of the result. The base image's stay unless the platform was really chosen.
pub(super) fn finish(config: &mut ImageConfig, target: &Platform, chosen: bool, labels: &BTreeMap<String, String>) {
    config.config.labels.extend(labels.iter().map(|(key, value)| (key.clone(), value.clone())));
    if chosen || config.os.is_empty() || config.architecture.is_empty() {
        let same = config.os == target.os && config.architecture == target.architecture;
        config.os.clone_from(&target.os);
        config.architecture.clone_from(&target.architecture);
        if target.variant.is_some() || !same {
            config.variant.clone_from(&target.variant);
        }
        if target.os_version.is_some() || !same {
            config.os_version.clone_from(&target.os_version);
        }
    }
    let platform =
        Platform { os: config.os.clone(), architecture: config.architecture.clone(), variant: config.variant.clone(), os_version: None }
            .normalized();
    config.os = platform.os;
    config.architecture = platform.architecture;
    config.variant = platform.variant;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_specs() {
        for (specs, expect) in [
            ("80", Ok("80/tcp")),
            ("80/TCP 53/udp", Ok("53/udp 80/tcp")),
            ("80-82/sctp", Ok("80/sctp 81/sctp 82/sctp")),
            ("127.0.0.1:8080:80", Ok("80/tcp")),
            ("[::1]:8080:80", Ok("80/tcp")),
            ("8080-8090:80", Ok("80/tcp")),
            ("80/", Ok("80/tcp")),
            ("/tcp", Err("no port specified: /tcp<empty>")),
            ("80/http", Err("invalid proto: http")),
            ("65536", Err("invalid containerPort: 65536")),
            ("82-80", Err("invalid containerPort: 82-80")),
            ("+80", Err("invalid containerPort: +80")),
            ("a:80", Err("invalid hostPort: a")),
            ("x:1:80", Err("invalid IP address: x")),
            ("1-2:80-90", Err("invalid ranges specified for container and host Ports: 80-90 and 1-2")),
        ] {
            let specs: Vec<String> = specs.split(' ').map(str::to_owned).collect();
            let got = ports(&specs).map(|ports| ports.join(" "));
            assert_eq!(got.as_deref().map_err(String::as_str), expect, "{specs:?}");
        }
        assert!(ports(&vec!["1-65535".to_owned(); 5]).is_err());
    }

    #[test]
    fn signals() {
        for good in ["9", "SIGTERM", "term", "SIGRTMIN+3", "RTMAX-14", "sigusr1", "RTMIN"] {
            assert!(is_signal(good), "{good}");
        }
        for bad in ["", "0", "SIG", "FOO", "RTMIN+16", "RTMAX-0", "RTMIN+03", "TERM KILL", "$SIG"] {
            assert!(!is_signal(bad), "{bad}");
        }
    }
}
