use super::*;
use crate::diagnostic::line_column;
use crate::parse;

fn found(text: &str) -> Vec<String> {
    let parsed = parse(text);
    let config = CheckConfig::parse(parsed.dockerfile.directives.check.as_deref().unwrap_or_default()).unwrap();
    lint(&parsed.dockerfile, text, &config)
        .into_iter()
        .map(|d| format!("{}:{} {} @ {}", line_column(text, d.span.start).0, d.code, d.message, &text[d.span.start..d.span.end]))
        .collect()
}

#[test]
fn check_configuration() {
    for (text, allowed, refused) in [
        ("", "A", "InvalidDefinitionDescription"),
        ("skip=A", "B", "A"),
        ("skip = A , B ; error = TRUE", "C", "B"),
        ("skip=all", "", "A"),
        ("skip=all;experimental=InvalidDefinitionDescription", "InvalidDefinitionDescription", "A"),
        ("experimental=all", "InvalidDefinitionDescription", ""),
        ("skip=InvalidDefinitionDescription;experimental=all", "InvalidDefinitionDescription", ""),
        ("skip=A;skip=B", "A", "B"),
        ("skip=ALL", "A", ""),
    ] {
        let config = CheckConfig::parse(text).unwrap();
        assert!(allowed.is_empty() || config.allows(allowed), "{text}");
        assert!(refused.is_empty() || !config.allows(refused), "{text}");
    }
    for text in ["nonsense", "skip=A;", ";", "error=yes", "error=tRuE", "errors=true", "skip"] {
        assert!(CheckConfig::parse(text).is_err(), "{text}");
    }
}

#[test]
fn every_rule_is_in_the_table() {
    // Table and pages are compared by the tests of the engine, which run the examples of the pages.
    assert!(rules::RULES.is_sorted_by_key(|rule| rule.name));
    for rule in rules::RULES {
        assert_eq!(rules::find(rule.name), Some(&rule));
    }
    assert_eq!(rules::find("unknown-instruction"), None);
}

#[test]
fn rules() {
    for (text, expect) in [
        ("FROM a AS b\nRUN c", &[][..]),
        ("FROM a AS Ab", &["1:StageNameCasing Stage name 'Ab' should be lowercase @ Ab"]),
        ("FROM a as b", &["1:FromAsCasing 'as' and 'FROM' keywords' casing do not match @ as"]),
        ("from a AS b", &["1:FromAsCasing 'AS' and 'from' keywords' casing do not match @ AS"]),
        ("from a as b", &[]),
        ("FROM a As b", &["1:FromAsCasing 'As' and 'FROM' keywords' casing do not match @ As"]),
        (
            "From a as b\nfrom c",
            &["1:ConsistentInstructionCasing Command 'From' should match the case of the command majority (lowercase) @ From"],
        ),
        ("FROM a\nRUN b \\\n\n  c", &["4:NoEmptyContinuation Empty continuation line @   c"]),
        ("FROM a\nRUN b \\\n #\n  c", &[]),
        ("FROM a\nRUN <<E\n\nE", &[]),
        (
            "FROM a\nrun b\nRUN c",
            &["2:ConsistentInstructionCasing Command 'run' should match the case of the command majority (uppercase) @ run"],
        ),
        (
            "from a\nrun b\nRUN c",
            &["3:ConsistentInstructionCasing Command 'RUN' should match the case of the command majority (lowercase) @ RUN"],
        ),
        ("arg X\nFROM a", &[]),
        (
            "from a\ncmd b",
            &["2:JSONArgsRecommended JSON arguments recommended for cmd to prevent unintended behavior related to OS signals @ cmd b"],
        ),
        ("FROM a AS b\nFROM c AS b", &["2:DuplicateStageName Duplicate stage name \"b\", stage names should be unique @ b"]),
        ("FROM a AS context", &["1:ReservedStageName Stage name should not use the same name as reserved stage \"context\" @ context"]),
        ("FROM a AS scratch", &["1:ReservedStageName Stage name should not use the same name as reserved stage \"scratch\" @ scratch"]),
        (
            "FROM a\nCMD b",
            &["2:JSONArgsRecommended JSON arguments recommended for CMD to prevent unintended behavior related to OS signals @ CMD b"],
        ),
        (
            "FROM a\nENTRYPOINT b c",
            &[
                "2:JSONArgsRecommended JSON arguments recommended for ENTRYPOINT to prevent unintended behavior related to OS signals @ ENTRYPOINT b c",
            ],
        ),
        ("FROM a\nCMD [\"b\"]\nHEALTHCHECK CMD c", &[]),
        ("FROM a\nSHELL [\"x\"]\nCMD b", &[]),
        ("FROM a AS x\nSHELL [\"x\"]\nFROM x\nCMD b", &[]),
        ("FROM a\nMAINTAINER b", &["2:MaintainerDeprecated Maintainer instruction is deprecated in favor of using label @ MAINTAINER"]),
        (
            "FROM a\nWORKDIR b",
            &["2:WorkdirRelativePath Relative workdir \"b\" can have unexpected results if the base image changes @ WORKDIR b"],
        ),
        ("FROM a\nWORKDIR /b\nWORKDIR c", &[]),
        ("FROM a\nWORKDIR $X\nWORKDIR C:/x\nWORKDIR \"/x\"", &[]),
        ("FROM a AS x\nWORKDIR /b\nFROM x\nWORKDIR c", &[]),
        (
            "FROM a\nCMD [\"a\"]\nCMD [\"b\"]",
            &[
                "2:MultipleInstructionsDisallowed Multiple CMD instructions should not be used in the same stage because only the last one will be used @ CMD",
            ],
        ),
        (
            "FROM a\nHEALTHCHECK NONE\nHEALTHCHECK NONE",
            &[
                "2:MultipleInstructionsDisallowed Multiple HEALTHCHECK instructions should not be used in the same stage because only the last one will be used @ HEALTHCHECK",
            ],
        ),
        ("FROM a\nCMD [\"a\"]\nFROM a\nCMD [\"b\"]", &[]),
        (
            "FROM a\nENV b c",
            &["2:LegacyKeyValueFormat \"ENV key=value\" should be used instead of legacy \"ENV key value\" format @ ENV b c"],
        ),
        (
            "FROM a\nLABEL b c",
            &["2:LegacyKeyValueFormat \"LABEL key=value\" should be used instead of legacy \"LABEL key value\" format @ LABEL b c"],
        ),
        (
            "FROM --platform=$TARGETPLATFORM a",
            &[
                "1:RedundantTargetPlatform Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior @ --platform=$TARGETPLATFORM",
            ],
        ),
        (
            "FROM --platform=${TARGETPLATFORM} a",
            &[
                "1:RedundantTargetPlatform Setting platform to predefined ${TARGETPLATFORM} in FROM is redundant as this is the default behavior @ --platform=${TARGETPLATFORM}",
            ],
        ),
        ("FROM --platform=${TARGETOS}/amd64 a", &[]),
        (
            "FROM --platform=linux/amd64 a",
            &[
                "1:FromPlatformFlagConstDisallowed FROM --platform flag should not use constant value \"linux/amd64\" @ --platform=linux/amd64",
            ],
        ),
        ("FROM --platform=linux/amd64 a AS b_amd64", &[]),
        ("FROM --platform=$BUILDPLATFORM a", &[]),
        (
            "FROM a\nARG DB_PASSWORD\nENV API_KEY=x",
            &[
                "2:SecretsUsedInArgOrEnv Do not use ARG or ENV instructions for sensitive data (ARG \"DB_PASSWORD\") @ DB_PASSWORD",
                "3:SecretsUsedInArgOrEnv Do not use ARG or ENV instructions for sensitive data (ENV \"API_KEY\") @ API_KEY",
            ],
        ),
        (
            "FROM a\nARG token\nENV auth=x",
            &[
                "2:SecretsUsedInArgOrEnv Do not use ARG or ENV instructions for sensitive data (ARG \"token\") @ token",
                "3:SecretsUsedInArgOrEnv Do not use ARG or ENV instructions for sensitive data (ENV \"auth\") @ auth",
            ],
        ),
        ("FROM a\nARG PUBLIC_KEY KEYBOARD TOKENIZER MONKEY TOKEN_FILE Key_Version", &[]),
        (
            "FROM a\nARG KEY_FILES",
            &["2:SecretsUsedInArgOrEnv Do not use ARG or ENV instructions for sensitive data (ARG \"KEY_FILES\") @ KEY_FILES"],
        ),
        ("FROM a\nEXPOSE 80/TCP 81", &["2:ExposeProtoCasing Defined protocol '80/TCP' in EXPOSE instruction should be lowercase @ 80/TCP"]),
        (
            "FROM a\nEXPOSE 127.0.0.1:80:80 8080:80",
            &[
                "2:ExposeInvalidFormat EXPOSE instruction should not define an IP address or host-port mapping, found '127.0.0.1:80:80' @ 127.0.0.1:80:80",
                "2:ExposeInvalidFormat EXPOSE instruction should not define an IP address or host-port mapping, found '8080:80' @ 8080:80",
            ],
        ),
        (
            "FROM a:$V",
            &[
                "1:UndefinedArgInFrom FROM argument 'V' is not declared @ a:$V",
                "1:InvalidDefaultArgInFrom Default value for ARG a:$V results in empty or invalid base image name @ a:$V",
            ],
        ),
        (
            "ARG VERSION=1\nFROM a:$VERSOIN-x",
            &[
                "2:UndefinedArgInFrom FROM argument 'VERSOIN' is not declared (did you mean VERSION?) @ a:$VERSOIN-x",
                "2:InvalidDefaultArgInFrom Default value for ARG a:$VERSOIN-x results in empty or invalid base image name @ a:$VERSOIN-x",
            ],
        ),
        (
            "FROM --platform=$BULIDPLATFORM a",
            &[
                "1:UndefinedArgInFrom FROM argument 'BULIDPLATFORM' is not declared (did you mean BUILDPLATFORM?) @ --platform=$BULIDPLATFORM",
            ],
        ),
        ("ARG V\nFROM a:$V", &["2:InvalidDefaultArgInFrom Default value for ARG a:$V results in empty or invalid base image name @ a:$V"]),
        ("ARG I\nFROM $I", &["2:InvalidDefaultArgInFrom Default value for ARG $I results in empty or invalid base image name @ $I"]),
        ("ARG V=1\nFROM a:$V", &[]),
        ("ARG V\nFROM a:${V:-1}", &[]),
        ("ARG V\nFROM a:1${V}", &[]),
        ("ARG A=x\nARG B=$A\nFROM $B", &[]),
        ("FROM a-$TARGETARCH", &[]),
        // The directive, and the comment above an instruction.
        ("# check=skip=StageNameCasing\nFROM a AS B", &[]),
        ("# check=skip=A,StageNameCasing;error=true\nFROM a AS B", &[]),
        ("# check=skip=all\nfrom a AS B", &[]),
        ("# check=error=true\nFROM a AS B", &["2:StageNameCasing Stage name 'B' should be lowercase @ B"]),
        (
            "FROM a\n# check=skip=MaintainerDeprecated\nMAINTAINER b\nMAINTAINER c",
            &["4:MaintainerDeprecated Maintainer instruction is deprecated in favor of using label @ MAINTAINER"],
        ),
        ("FROM a\n# check=skip=all\nENV b c", &[]),
        (
            "FROM a\n# check=skip=StageNameCasing\nENV b c",
            &["3:LegacyKeyValueFormat \"ENV key=value\" should be used instead of legacy \"ENV key value\" format @ ENV b c"],
        ),
        // `experimental=` is stronger than `skip=`; `all` stands alone.
        (
            "# check=skip=all;experimental=all\n# x\nfrom a AS b",
            &["3:InvalidDefinitionDescription Comment for FROM should follow the format: `# b <description>` @ from a AS b"],
        ),
        ("# check=skip=A,all\nFROM a AS B", &["2:StageNameCasing Stage name 'B' should be lowercase @ B"]),
        // Only when asked for.
        ("# a comment\nFROM a AS b", &[]),
        (
            "# check=experimental=InvalidDefinitionDescription\n# a comment\nFROM a AS b",
            &["3:InvalidDefinitionDescription Comment for FROM should follow the format: `# b <description>` @ FROM a AS b"],
        ),
        (
            "# check=experimental=all\n# b is good\nFROM a AS b\n# x\nARG y\n# z\nARG v w",
            &[
                "5:InvalidDefinitionDescription Comment for ARG should follow the format: `# y <description>` @ ARG y",
                "7:InvalidDefinitionDescription Comment for ARG should follow the format: `# <arg_key> <description>` @ ARG v w",
            ],
        ),
        ("# check=experimental=all\n# far away\n\nFROM a AS b", &[]),
        // Findings come although the file has an error further down.
        (
            "FROM a AS B\nMAINTAINER c\nBAD",
            &[
                "1:StageNameCasing Stage name 'B' should be lowercase @ B",
                "2:MaintainerDeprecated Maintainer instruction is deprecated in favor of using label @ MAINTAINER",
            ],
        ),
    ] {
        assert_eq!(found(text), expect, "{text}");
    }
}
