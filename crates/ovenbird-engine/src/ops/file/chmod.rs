//! `--chmod`: octal, or symbols as `chmod(1)` knows them. The umask is 0.

use super::FileError;

/// A change of permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// All bits.
    Absolute(u32),
    /// Clauses in order.
    Symbolic(Vec<Clause>),
}

/// `ug+rX`: one operator of one clause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Clause {
    /// Bits of the classes it is about (0o700, 0o070, 0o007).
    who: u32,
    operator: Operator,
    /// `rwx` as 0–7.
    bits: u32,
    /// `X`.
    execute_if_any: bool,
    /// `s`.
    set_id: bool,
    /// `t`.
    sticky: bool,
    /// `g=u`: the class whose bits are taken (6, 3 or 0: how far they are shifted).
    copy: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Add,
    Remove,
    Set,
}

impl Change {
    /// Reads `0755` or `u=rwX,go=rX`.
    pub(crate) fn parse(text: &str) -> Result<Self, FileError> {
        let error = |reason| FileError::Mode { mode: text.chars().take(100).collect(), reason };
        if text.is_empty() {
            return Err(error("it is empty"));
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return match u32::from_str_radix(text, 8) {
                Ok(mode) if mode <= 0o7777 => Ok(Self::Absolute(mode)),
                Ok(_) => Err(error("it is larger than 7777")),
                Err(_) => Err(error("it is not octal")),
            };
        }
        let mut clauses = Vec::new();
        for clause in text.split(',') {
            let operators = clause.find(['+', '-', '=']).ok_or_else(|| error("a clause needs one of + - ="))?;
            let (who, mut rest) = clause.split_at(operators);
            let mut classes = 0;
            for class in who.chars() {
                classes |= match class {
                    'u' => 0o700,
                    'g' => 0o070,
                    'o' => 0o007,
                    'a' => 0o777,
                    _ => return Err(error("only u, g, o and a may stand before + - =")),
                };
            }
            while let Some(operator) = rest.chars().next() {
                let operator = match operator {
                    '+' => Operator::Add,
                    '-' => Operator::Remove,
                    _ => Operator::Set,
                };
                let end = rest[1..].find(['+', '-', '=']).map_or(rest.len(), |n| n + 1);
                let mut one = Clause {
                    who: if classes == 0 { 0o777 } else { classes },
                    operator,
                    bits: 0,
                    execute_if_any: false,
                    set_id: false,
                    sticky: false,
                    copy: None,
                };
                for permission in rest[1..end].chars() {
                    match permission {
                        'r' => one.bits |= 4,
                        'w' => one.bits |= 2,
                        'x' => one.bits |= 1,
                        'X' => one.execute_if_any = true,
                        's' => one.set_id = true,
                        't' => one.sticky = true,
                        'u' | 'g' | 'o' if end == 2 => {
                            one.copy = Some(match permission {
                                'u' => 6,
                                'g' => 3,
                                _ => 0,
                            });
                        }
                        _ => return Err(error("only r, w, x, X, s, t, or one of u, g, o may stand after + - =")),
                    }
                }
                clauses.push(one);
                rest = &rest[end..];
            }
        }
        Ok(Self::Symbolic(clauses))
    }

    /// The new permission bits of something that has `mode`.
    pub(crate) fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        match self {
            Self::Absolute(mode) => *mode,
            Self::Symbolic(clauses) => clauses.iter().fold(mode & 0o7777, |now, clause| clause.apply(now, mode, is_dir)),
        }
    }
}

impl Clause {
    fn apply(&self, now: u32, before: u32, is_dir: bool) -> u32 {
        let mut bits = self.copy.map_or(self.bits, |shift| (now >> shift) & 7);
        if self.execute_if_any && (is_dir || before & 0o111 != 0) {
            bits |= 1;
        }
        let mut change = (bits * 0o111) & self.who;
        if self.set_id {
            change |= if self.who & 0o700 != 0 { 0o4000 } else { 0 } | if self.who & 0o070 != 0 { 0o2000 } else { 0 };
        }
        if self.sticky && (self.who == 0o777 || self.who & 0o007 != 0) {
            change |= 0o1000;
        }
        match self.operator {
            Operator::Add => now | change,
            Operator::Remove => now & !change,
            Operator::Set => {
                let ids = if self.who & 0o700 != 0 { 0o4000 } else { 0 } | if self.who & 0o070 != 0 { 0o2000 } else { 0 };
                let sticky = if self.who == 0o777 { 0o1000 } else { 0 };
                (now & !(self.who | ids | sticky)) | change
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes() {
        // change, mode before, folder, mode after
        for (text, before, is_dir, after) in [
            ("755", 0o600, false, 0o755),
            ("0644", 0o4755, false, 0o644),
            ("4755", 0o600, false, 0o4755),
            ("0", 0o777, true, 0),
            ("7777", 0, true, 0o7777),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("u=rwX,go=rX", 0o4755, false, 0o755),
            ("+x", 0o644, false, 0o755),
            ("+X", 0o644, false, 0o644),
            ("+X", 0o744, false, 0o755),
            ("a-w", 0o666, false, 0o444),
            ("-w", 0o777, true, 0o555),
            ("go-rwx", 0o755, true, 0o700),
            ("g=u", 0o640, false, 0o660),
            ("o=g", 0o640, false, 0o644),
            ("go=", 0o777, false, 0o700),
            ("u+s", 0o755, false, 0o4755),
            ("g+s", 0o755, true, 0o2755),
            ("+s", 0o755, false, 0o6755),
            ("+t", 0o777, true, 0o1777),
            ("o+t", 0o777, true, 0o1777),
            ("a=rw", 0o1755, false, 0o666),
            ("=r", 0o755, false, 0o444),
            ("u+w-x", 0o555, false, 0o655),
            ("u=rw,g+w,o-r", 0o744, false, 0o660),
            ("a=,u+rX", 0o755, false, 0o500),
        ] {
            assert_eq!(Change::parse(text).unwrap().apply(before, is_dir), after, "{text} on {before:o}");
        }
        for bad in ["", "8", "0888", "10000", "999999999999999999999", "u", "z+x", "u+q", "u=rwx,", "u+gx", "rwx", "+é", "0x1ff"] {
            assert!(matches!(Change::parse(bad), Err(FileError::Mode { .. })), "{bad}");
        }
    }
}
