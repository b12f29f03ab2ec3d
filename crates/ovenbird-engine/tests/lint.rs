//! Findings of the one check behind `lint`, `build --check` and the warnings of a build; and the pages of the rules, whose examples
//! are run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_dockerfile::lint::rules::{self, RULES};
use ovenbird_dockerfile::{Severity, diagnostic, parse};
use ovenbird_engine::frontend::{Findings, Images, Lowered, Options, check, lower};
use ovenbird_engine::plan::{ImageRequest, ResolvedImage};
use ovenbird_oci::Digest;
use serde_json::json;

/// Images that can be had: all but `gone`.
fn resolve(request: &ImageRequest) -> Result<ResolvedImage, String> {
    let (mut architecture, mut config) = (request.platform.architecture.as_str(), json!({ "Env": ["PATH=/bin"] }));
    match request.name.as_str() {
        "gone" => return Err("no route".into()),
        "example/only-for-amd64" => architecture = "amd64",
        "app" => config = json!({ "Env": ["FROM_BASE=x"], "Shell": ["/bin/bash", "-c"] }),
        "trigger" => config = json!({ "OnBuild": ["COPY --from=gone a /", "WORKDIR x"] }),
        _ => {}
    }
    let config = json!({
        "architecture": architecture, "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(b"layer").to_string()] },
    });
    let reference = request.name.parse().map_err(|e| format!("{e}"))?;
    Ok(ResolvedImage { reference, manifest: Digest::of(b"m"), config: serde_json::from_value(config).map_err(|e| e.to_string())? })
}

/// From the arguments of a command line: `--build-arg A=B --target T --platform P`.
fn options(line: &str, ignore: &str) -> Options {
    let mut options = Options {
        platform: "linux/amd64".parse().unwrap(),
        build_platform: "linux/amd64".parse().unwrap(),
        ignore: Patterns::parse(ignore).unwrap(),
        ..Options::default()
    };
    let mut words = line.split_whitespace();
    while let Some(flag) = words.next() {
        let value = words.next().unwrap();
        match flag {
            "--build-arg" => {
                let (name, value) = value.split_once('=').unwrap();
                options.build_args.insert(name.into(), value.into());
            }
            "--target" => options.target = Some(value.into()),
            "--platform" => options.platform = value.parse().unwrap(),
            other => panic!("{other}"),
        }
    }
    options
}

/// `line severity rule message`, and `? image` for what could not be looked up.
fn told(text: &str, found: &Findings) -> Vec<String> {
    let told = found.diagnostics.iter().map(|d| {
        let severity = if d.severity == Severity::Error { "error " } else { "" };
        format!("{} {severity}{} {}", diagnostic::line_column(text, d.span.start).0, d.code, d.message)
    });
    told.chain(found.unknown.keys().map(|image| format!("? {image}"))).collect()
}

/// What the build of the same file warns of, or fails with.
fn of_build(text: &str, options: &Options) -> Option<Findings> {
    let parsed = parse(text);
    let mut images = Images::new();
    loop {
        let diagnostics = match lower(&parsed.dockerfile, text, options, &images) {
            Ok(Lowered::Needs(needs)) => {
                for need in needs {
                    let image = resolve(&need).ok()?;
                    images.insert(need, image);
                }
                continue;
            }
            Ok(Lowered::Done(_, warnings)) => warnings,
            Err(diagnostics) => diagnostics,
        };
        return Some(Findings { diagnostics, unknown: BTreeMap::new() });
    }
}

#[test]
fn findings() {
    let undefined = |line: usize, name: &str| format!("{line} UndefinedVar Usage of undefined variable '${name}'");
    let copy =
        |line: usize, name: &str| format!("{line} CopyIgnoredFile Attempting to Copy file \"{name}\" that is excluded by .dockerignore");
    let json = |line: usize| {
        format!("{line} JSONArgsRecommended JSON arguments recommended for CMD to prevent unintended behavior related to OS signals")
    };
    let workdir =
        |path: &str| format!("3 WorkdirRelativePath Relative workdir {path:?} can have unexpected results if the base image changes");
    let lower = |line: usize, severity: &str| format!("{line} {severity}StageNameCasing Stage name 'B' should be lowercase");
    let rows: Vec<(&str, &str, &str, Vec<String>)> = vec![
        ("FROM debian\nENV A=$B", "", "", vec![undefined(2, "B")]),
        ("FROM app\nENV A=$FROM_BASE", "", "", vec![]),
        ("FROM debian\nARG B\nENV A=$B C=${D:-1}", "", "", vec![undefined(3, "D")]),
        ("FROM debian\nRUN echo $B", "", "", vec![]),
        // What an image defines that cannot be had is not known.
        (
            "FROM gone\nENV A=$B\nWORKDIR $C\nEXPOSE $PORT\nCOPY --chmod=$D a /\nMAINTAINER x",
            "",
            "",
            vec!["6 MaintainerDeprecated Maintainer instruction is deprecated in favor of using label".into(), "? gone".into()],
        ),
        ("FROM gone AS a\nFROM a\nENV A=$B\nFROM debian\nENV A=$B\nCOPY --from=1 /a /", "", "", vec![undefined(5, "B"), "? gone".into()]),
        ("FROM trigger\nENV A=$B", "", "", vec![undefined(2, "B"), "? gone".into()]),
        ("FROM debian\nCOPY --from=gone a /\nENV A=$B", "", "", vec![undefined(3, "B"), "? gone".into()]),
        // All stages, or those that the target needs.
        ("FROM debian AS a\nENV A=$B\nFROM debian\nENV A=$C", "", "", vec![undefined(2, "B"), undefined(4, "C")]),
        ("FROM debian AS a\nCMD x\nFROM debian\nCMD y", "", "", vec![json(2), json(4)]),
        ("FROM debian AS a\nENV A=$B\nFROM debian\nENV A=$C", "--target a", "", vec![undefined(2, "B")]),
        // The shell may come with the image.
        ("FROM debian\nCMD x", "", "", vec![json(2)]),
        ("FROM app\nCMD x", "", "", vec![]),
        ("FROM app AS a\nFROM a\nCMD x", "", "", vec![]),
        // The ignore file.
        ("FROM debian\nCOPY a ./b/ c/../d /x/", "", "a\nb\nd", vec![copy(2, "a"), copy(2, "b"), copy(2, "d")]),
        ("FROM debian\nCOPY . /x/", "", "*", vec![copy(2, ".")]),
        ("FROM debian\nCOPY a b /x/\nCOPY --from=app a /\nADD https://h/a /", "", "a\n!a/b", vec![]),
        ("FROM debian\nCOPY --from=app a /\nADD https://h/a /\nCOPY <<a /\nx\na\nCOPY b /", "", "a\nhttps*", vec![]),
        (
            "FROM debian\nARG X=a\nADD $X /",
            "",
            "a",
            vec!["3 CopyIgnoredFile Attempting to Add file \"a\" that is excluded by .dockerignore".into()],
        ),
        ("# check=skip=CopyIgnoredFile\nFROM debian\nCOPY a /", "", "a", vec![]),
        ("FROM debian\n# check=skip=CopyIgnoredFile\nCOPY a /\nCOPY a /", "", "a", vec![copy(4, "a")]),
        // Expanded words.
        ("FROM debian\nARG A=x\nWORKDIR $A", "", "", vec![workdir("x")]),
        ("FROM debian\nARG A=/x\nWORKDIR $A\nWORKDIR y", "", "", vec![]),
        ("FROM debian\nWORKDIR /a\nARG A=x\nWORKDIR $A", "", "", vec![]),
        ("FROM debian AS a\nWORKDIR /a\nFROM a\nARG A=x\nWORKDIR $A", "", "", vec![]),
        (
            "FROM debian\nARG A=1/TCP\nEXPOSE $A",
            "",
            "",
            vec!["3 ExposeProtoCasing Defined protocol '1/TCP' in EXPOSE instruction should be lowercase".into()],
        ),
        (
            "FROM debian\nARG A=1:2\nEXPOSE $A 3",
            "",
            "",
            vec!["3 ExposeInvalidFormat EXPOSE instruction should not define an IP address or host-port mapping, found '1:2'".into()],
        ),
        // Errors in the same list.
        ("FROM debian AS B\nBADCMD", "", "", vec![lower(1, ""), "2 error unknown-instruction unknown instruction: BADCMD".into()]),
        ("FROM debian AS B\nVOLUME \"\"", "", "", vec![lower(1, ""), "2 error volume VOLUME specified can not be an empty string".into()]),
        ("# check=error=true\nFROM debian AS B", "", "", vec![lower(2, "error ")]),
        (
            "# check=error=true\nFROM debian AS B\nBADCMD",
            "",
            "",
            vec![lower(2, "error "), "3 error unknown-instruction unknown instruction: BADCMD".into()],
        ),
        ("# check=skip=all\nFROM debian AS B", "--build-arg BUILDKIT_DOCKERFILE_CHECK=error=true", "", vec![lower(2, "error ")]),
        (
            "# check=error=true\nFROM debian",
            "--build-arg A=1",
            "",
            vec!["1 UnconsumedBuildArg One or more build-args [A] were not consumed".into()],
        ),
        (
            "# check=skip\nFROM debian",
            "",
            "",
            vec![
                "1 error invalid-check invalid check option \"skip\": write `skip=Rule1,Rule2`, `error=true` or `experimental=Rule`".into(),
            ],
        ),
        (
            "# syntax=x\n# check=error=maybe\nFROM debian",
            "",
            "",
            vec!["2 error invalid-check failed to parse check option error=\"maybe\": write true or false".into()],
        ),
        (
            "FROM debian",
            "--build-arg BUILDKIT_DOCKERFILE_CHECK=skip=A;",
            "",
            vec!["1 error invalid-check invalid check option \"\": write `skip=Rule1,Rule2`, `error=true` or `experimental=Rule`".into()],
        ),
        ("FROM debian", "--target x", "", vec!["1 error target target stage \"x\" could not be found".into()]),
    ];
    for (text, line, ignore, expect) in rows {
        let options = options(line, ignore);
        let found = check(text, std::slice::from_ref(&options), &mut resolve);
        assert_eq!(told(text, &found), expect, "{text} [{line}] [{ignore}]");
        // A build that gets its images says the same of the stages that it needs, but for what `error=true` and the parser make of it.
        let errors = found.diagnostics.iter().any(|d| d.severity == Severity::Error);
        if let (false, true, Some(build)) = (errors, found.unknown.is_empty(), of_build(text, &options)) {
            let missed: Vec<_> = build.diagnostics.iter().filter(|d| !found.diagnostics.contains(d)).collect();
            assert!(missed.is_empty() && (text.matches("FROM").count() > 1 || build == found), "{text}: {build:?} {found:?}");
        }
    }
}

#[test]
fn several_platforms_say_each_thing_once() {
    let text = "FROM example/only-for-amd64 AS B\nENV A=$TARGETARCH";
    let platforms = ["linux/amd64", "linux/arm64"].map(|platform| options(&format!("--platform {platform}"), ""));
    let found = check(text, &platforms, &mut resolve);
    let codes: Vec<&str> = found.diagnostics.iter().map(|d| &*d.code).collect();
    assert_eq!(codes, ["InvalidBaseImagePlatform", "StageNameCasing", "UndefinedVar"]);
}

#[test]
fn hostile_files_have_few_findings() {
    let many = "FROM debian\n".to_owned() + &"MAINTAINER x\n".repeat(20_000) + "BADCMD\n";
    let found = check(&many, &[options("", "")], &mut resolve);
    assert_eq!(found.diagnostics.len(), 1000);
    assert_eq!(found.diagnostics.last().unwrap().severity, Severity::Error, "errors are kept");
}

fn pages() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/lint"))
}

/// The content of the first block of that language below a heading.
fn block<'p>(page: &'p str, heading: &str, language: &str) -> Option<&'p str> {
    let (_, section) = page.split_once(&format!("\n## {heading}\n"))?;
    let section = section.split("\n## ").next()?;
    let (_, block) = section.split_once(&format!("```{language}\n"))?;
    block.split("```").next()
}

#[test]
fn every_rule_has_a_page_and_every_page_a_rule() {
    let index = std::fs::read_to_string(pages().join("README.md")).unwrap();
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(pages()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name != "README.md" {
            let rule = rules::find(name.strip_suffix(".md").unwrap());
            seen.insert(rule.unwrap_or_else(|| panic!("{name} is the page of no rule")).name);
        }
    }
    for rule in RULES {
        assert!(seen.contains(rule.name), "{} has no page", rule.name);
        let suffix = if rule.experimental { " (experimental)" } else { "" };
        let row = format!("| [{0}]({0}.md) | {1}{suffix} |", rule.name, rule.summary);
        assert!(index.contains(&row), "the index lacks {row}");
    }
}

#[test]
fn examples_of_the_pages_are_true() {
    for rule in RULES {
        let page = std::fs::read_to_string(pages().join(format!("{}.md", rule.name))).unwrap();
        assert!(page.starts_with(&format!("# {}\n", rule.name)), "{}", rule.name);
        for heading in ["What", "Why"] {
            assert!(page.contains(&format!("\n## {heading}\n")), "{}: {heading}", rule.name);
        }
        for (heading, violates) in [("Bad", true), ("Good", false)] {
            let text = block(&page, heading, "dockerfile").unwrap_or_else(|| panic!("{}: no example below {heading}", rule.name));
            let command = block(&page, heading, "console").unwrap_or_default();
            let flags = command.trim().strip_prefix("$ ovenbird lint").unwrap_or_default();
            let options = options(flags, block(&page, heading, "dockerignore").unwrap_or_default());
            let found = check(text, &[options], &mut resolve);
            let codes: Vec<&str> = found.diagnostics.iter().map(|d| &*d.code).collect();
            if violates {
                assert!(!codes.is_empty() && codes.iter().all(|code| *code == rule.name), "{} {heading}: {codes:?}", rule.name);
            } else {
                assert!(codes.is_empty(), "{} {heading}: {codes:?}", rule.name);
            }
        }
    }
}
