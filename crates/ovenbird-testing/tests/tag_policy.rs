//! Tags from the settings and from git, in a real registry: which there are, and which move.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::Registry;

const LIMIT: Duration = Duration::from_mins(2);

fn git(dir: &Path, line: &str) -> Result<String> {
    let mut command = Command::new("git");
    command.args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-C"]).arg(dir).args(line.split(' '));
    output(&mut command).map(|text| text.trim().to_owned())
}

/// Every tag of the repository, and the digest it is at.
fn tags(repository: &str) -> Result<BTreeMap<String, String>> {
    let skopeo = |arguments: &[&str]| output(Command::new("skopeo").args(arguments));
    let place = format!("docker://{repository}");
    let listed: serde_json::Value = serde_json::from_str(&skopeo(&["list-tags", "--tls-verify=false", &place])?).unwrap();
    let mut found = BTreeMap::new();
    for tag in listed["Tags"].as_array().unwrap() {
        let tag = tag.as_str().unwrap().to_owned();
        let digest = skopeo(&["inspect", "--tls-verify=false", "--format={{.Digest}}", &format!("{place}:{tag}")])?;
        found.insert(tag, digest.trim().to_owned());
    }
    Ok(found)
}

#[test]
fn releases_and_what_follows_them() -> Result<()> {
    if !needs::available("releases_and_what_follows_them", &[Need::Registry, Need::Git]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let repository = format!("{}/team/app", registry.address());
    let room = Workspace::new(Level::Own)?;
    let context = room.path().join("ctx");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY a /a\n").unwrap();
    let policy = "[tags]\nunique = ['{git.sha}']\nprimary = ['{git.tag}']\nfloating = ['latest', '{git.branch}', '{git.minor}']\n";
    fs::write(room.path().join("settings.toml"), policy).unwrap();
    git(&context, "init -q")?;
    let commit = |content: &str, tag: &str| -> Result<String> {
        fs::write(context.join("a"), content).unwrap();
        git(&context, "add -A")?;
        git(&context, "commit -q -m x")?;
        if !tag.is_empty() {
            git(&context, &format!("tag {tag}"))?;
        }
        git(&context, "rev-parse HEAD")
    };
    let push = |more: &[&str]| -> Result<(String, String)> {
        let mut command = room.ovenbird();
        command.args([
            "--root",
            "state",
            "--settings",
            "settings.toml",
            "--progress",
            "plain",
            "build",
            "ctx",
            "--push",
            "-t",
            &repository,
        ]);
        let (code, log) = finish(command.args(more), None, LIMIT)?;
        assert_eq!(code, Some(0), "{log}");
        let digest = log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default().to_owned();
        Ok((digest, log))
    };

    // A tag on the main branch gives exactly the configured tags.
    let one = commit("a", "v1.2.3")?;
    let first = push(&[])?.0;
    let mut expected: BTreeMap<String, String> =
        [&one, "v1.2.3", "latest", "main", "v1.2"].iter().map(|tag| ((*tag).to_owned(), first.clone())).collect();
    assert_eq!(tags(&repository)?, expected);

    // The next release moves what floats.
    let two = commit("b", "v1.2.9")?;
    let second = push(&[])?.0;
    assert_ne!(first, second);
    for tag in [&two, "v1.2.9", "latest", "main", "v1.2"] {
        expected.insert(tag.to_owned(), second.clone());
    }
    assert_eq!(tags(&repository)?, expected);

    // The old one, built once more: nothing that floats goes back. No branch is checked out, so no tag has its name.
    git(&context, &format!("checkout -q --detach {one}"))?;
    let (_, log) = push(&[])?;
    assert_eq!(tags(&repository)?, expected);
    assert!(log.contains("team/app:latest stays at v1.2.9: it moves forward only, and this image is v1.2.3"), "{log}");
    assert!(log.contains("team/app:v1.2 stays at v1.2.9"), "{log}");

    // Another line of versions leaves the old one where it is.
    git(&context, "checkout -q main")?;
    let three = commit("c", "v1.3.0")?;
    let third = push(&[])?.0;
    for tag in [&three, "v1.3.0", "v1.3", "latest", "main"] {
        expected.insert(tag.to_owned(), third.clone());
    }
    assert_eq!(tags(&repository)?, expected);

    // A late fix of the old line moves that line, and not what follows all.
    git(&context, &format!("checkout -q --detach {two}"))?;
    let four = commit("d", "v1.2.10")?;
    let fix = push(&[])?.0;
    for tag in [&four, "v1.2.10", "v1.2"] {
        expected.insert(tag.to_owned(), fix.clone());
    }
    assert_eq!(tags(&repository)?, expected);

    // A commit without a version moves what floats, whatever is there.
    git(&context, "checkout -q main")?;
    let five = commit("e", "")?;
    let plain = push(&[])?.0;
    for tag in [&five, "latest", "main"] {
        expected.insert(tag.to_owned(), plain.clone());
    }
    assert_eq!(tags(&repository)?, expected);

    // A branch whose name no tag can have; a name with a tag takes no tags from the policy.
    git(&context, "checkout -q -b feature/Über")?;
    let named = format!("{repository}:{{git.branch}}-{{git.short}}");
    let mut command = room.ovenbird();
    command.args(["--root", "state", "--settings", "settings.toml", "build", "ctx", "--push", "-q", "-t", &named]);
    assert_eq!(finish(&mut command, None, LIMIT)?.0, Some(0));
    expected.insert(format!("feature-ber-{}", &five[..12]), plain);
    assert_eq!(tags(&repository)?, expected);
    Ok(())
}
