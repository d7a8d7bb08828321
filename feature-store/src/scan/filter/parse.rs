//! Text to [`Condition`]: `sqlparser`'s tokenizer, and a parser of just the grammar of filters.
//!
//! `sqlparser`'s own expression parser is not used: it tries alternatives and backtracks, and
//! a hostile filter kept it busy for more than ten minutes. This one never goes back, so its
//! work grows with the length of the text, and it recurses only into parentheses and `not`.

use sqlparser::dialect::GenericDialect;
use sqlparser::keywords::Keyword;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan, Tokenizer};

use super::literal::{Literal, LiteralValue, Number, parse_date, parse_moment};
use super::{
    CompareOp, Condition, FilterError, MAX_FILTER_BYTES, MAX_FILTER_CONDITIONS, MAX_FILTER_DEPTH,
};

const CONDITIONS: &str =
    "filters know comparisons of a column with a literal, in, between, is null, and, or, not";
const LITERALS: &str =
    "a literal is a number, 'text', true, false, timestamp '...', date '...' or X'hex'";
const COLUMNS: &str = "one side of a comparison is a column, the other a literal";
const NULLS: &str = "a comparison with null is never true: use `is null` or `is not null`";
const CALLS: &str = "filters call no functions and hold no queries";

/// Longest piece of a filter that an error repeats, in characters.
const MAX_FRAGMENT_CHARS: usize = 120;

/// Parses a filter's text.
pub(super) fn condition(text: &str) -> Result<Condition, FilterError> {
    if text.len() > MAX_FILTER_BYTES {
        return Err(FilterError::TooLong {
            bytes: text.len(),
            limit_bytes: MAX_FILTER_BYTES,
        });
    }
    let mut tokens = Tokenizer::new(&GenericDialect {}, text)
        .tokenize_with_location()
        .map_err(|e| FilterError::Syntax {
            problem: e.to_string(),
        })?;
    tokens.retain(|t| !matches!(t.token, Token::Whitespace(_) | Token::EOF));
    if tokens.is_empty() {
        return Err(FilterError::Empty);
    }
    let mut parser = Parser {
        text,
        tokens,
        at: 0,
        depth: 0,
        conditions: 0,
    };
    let condition = parser.any_of()?;
    match parser.peek() {
        None => Ok(condition),
        Some(Token::RParen) => Err(parser.syntax("a closing parenthesis too many")),
        Some(_) => Err(parser.unsupported(parser.at, "a filter is one expression")),
    }
}

struct Parser<'a> {
    text: &'a str,
    /// Without white space.
    tokens: Vec<TokenWithSpan>,
    at: usize,
    depth: usize,
    conditions: usize,
}

enum Operand {
    Column(String),
    Literal(Literal),
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|t| &t.token)
    }

    /// The keyword at `at + ahead`, when an unquoted word stands there.
    fn keyword(&self, ahead: usize) -> Option<Keyword> {
        match self.tokens.get(self.at + ahead).map(|t| &t.token) {
            Some(Token::Word(word)) if word.quote_style.is_none() => Some(word.keyword),
            _ => None,
        }
    }

    fn take_keyword(&mut self, keyword: Keyword) -> bool {
        let found = self.keyword(0) == Some(keyword);
        self.at += usize::from(found);
        found
    }

    fn take(&mut self, token: &Token) -> bool {
        let found = self.peek() == Some(token);
        self.at += usize::from(found);
        found
    }

    /// `a or b or c`
    fn any_of(&mut self) -> Result<Condition, FilterError> {
        let first = self.all_of()?;
        if self.keyword(0) != Some(Keyword::OR) {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.take_keyword(Keyword::OR) {
            all.push(self.all_of()?);
        }
        Ok(Condition::Or(all))
    }

    /// `a and b and c`
    fn all_of(&mut self) -> Result<Condition, FilterError> {
        let first = self.one()?;
        if self.keyword(0) != Some(Keyword::AND) {
            return Ok(first);
        }
        let mut all = vec![first];
        while self.take_keyword(Keyword::AND) {
            all.push(self.one()?);
        }
        Ok(Condition::And(all))
    }

    /// `not a`, `(a)`, or a condition on one column.
    fn one(&mut self) -> Result<Condition, FilterError> {
        if self.take_keyword(Keyword::NOT) {
            self.enter()?;
            let inner = self.one()?;
            self.depth -= 1;
            return Ok(Condition::Not(Box::new(inner)));
        }
        let start = self.at;
        if self.take(&Token::LParen) {
            self.enter()?;
            let inner = self.any_of()?;
            self.depth -= 1;
            if !self.take(&Token::RParen) {
                return Err(match self.peek() {
                    None => self.syntax("a closing parenthesis is missing"),
                    Some(_) => self.unsupported(start + 1, CONDITIONS),
                });
            }
            return match inner {
                // `(a) = 1`
                Condition::Column(name) => self.compare(start, Operand::Column(name)),
                inner => Ok(inner),
            };
        }
        let operand = self.operand()?;
        self.compare(start, operand)
    }

    fn enter(&mut self) -> Result<(), FilterError> {
        self.depth += 1;
        if self.depth > MAX_FILTER_DEPTH {
            return Err(FilterError::TooDeep {
                limit: MAX_FILTER_DEPTH,
            });
        }
        Ok(())
    }

    /// What follows the left side of a condition that began at token `start`.
    fn compare(&mut self, start: usize, left: Operand) -> Result<Condition, FilterError> {
        self.conditions += 1;
        if self.conditions > MAX_FILTER_CONDITIONS {
            return Err(FilterError::TooManyConditions {
                limit: MAX_FILTER_CONDITIONS,
            });
        }
        if let Some(op) = self.peek().and_then(compare_op) {
            self.at += 1;
            let right = self.operand()?;
            let condition = match (left, right) {
                (Operand::Column(name), Operand::Literal(literal)) => {
                    Condition::Compare(name, op, literal)
                }
                (Operand::Literal(literal), Operand::Column(name)) => {
                    Condition::Compare(name, flip(op), literal)
                }
                _ => return Err(self.unsupported(start, COLUMNS)),
            };
            return self.ended(start, condition);
        }
        let Operand::Column(name) = left else {
            return Err(self.unsupported(start, COLUMNS));
        };
        if self.take_keyword(Keyword::IS) {
            let negated = self.take_keyword(Keyword::NOT);
            if !self.take_keyword(Keyword::NULL) {
                return Err(self.unsupported(start, "after `is` comes `null` or `not null`"));
            }
            return self.ended(start, negate(Condition::IsNull(name), negated));
        }
        let negated = self.take_keyword(Keyword::NOT);
        let condition = if self.take_keyword(Keyword::IN) {
            if !self.take(&Token::LParen) {
                return Err(
                    self.unsupported(start, "after `in` comes a list of literals in parentheses")
                );
            }
            let mut list = vec![self.literal()?];
            while self.take(&Token::Comma) {
                list.push(self.literal()?);
            }
            if !self.take(&Token::RParen) {
                return Err(self.unsupported(start, "an `in` list holds literals, between commas"));
            }
            Condition::In(name, list)
        } else if self.take_keyword(Keyword::BETWEEN) {
            let low = Condition::Compare(name.clone(), CompareOp::GtEq, self.literal()?);
            if !self.take_keyword(Keyword::AND) {
                return Err(
                    self.unsupported(start, "`between` takes two literals: between 1 and 5")
                );
            }
            let high = Condition::Compare(name, CompareOp::LtEq, self.literal()?);
            Condition::And(vec![low, high])
        } else if negated {
            return Err(self.unsupported(start, CONDITIONS));
        } else {
            Condition::Column(name)
        };
        self.ended(start, negate(condition, negated))
    }

    /// The condition, when what follows can follow a condition.
    fn ended(&self, start: usize, condition: Condition) -> Result<Condition, FilterError> {
        let compared =
            matches!(condition, Condition::Column(_)) && self.peek().and_then(compare_op).is_some();
        let ends = matches!(self.peek(), None | Some(Token::RParen))
            || matches!(self.keyword(0), Some(Keyword::AND | Keyword::OR))
            || compared;
        if ends {
            Ok(condition)
        } else {
            Err(self.unsupported(start, CONDITIONS))
        }
    }

    /// A column or a literal, possibly in parentheses when on the right.
    fn operand(&mut self) -> Result<Operand, FilterError> {
        let start = self.at;
        let mut opened = 0;
        while self.take(&Token::LParen) {
            opened += 1;
        }
        let operand = match self.column()? {
            Some(name) => Operand::Column(name),
            None => Operand::Literal(self.literal()?),
        };
        for _ in 0..opened {
            if !self.take(&Token::RParen) {
                return Err(self.unsupported(start, COLUMNS));
            }
        }
        Ok(operand)
    }

    fn column(&mut self) -> Result<Option<String>, FilterError> {
        let Some(Token::Word(word)) = self.peek() else {
            return Ok(None);
        };
        let next = self.tokens.get(self.at + 1).map(|t| &t.token);
        if word.quote_style.is_none() {
            if matches!(next, Some(Token::SingleQuotedString(_))) || self.is_reserved() {
                return Ok(None);
            }
            if matches!(next, Some(Token::LParen)) && self.keyword(0) != Some(Keyword::IN) {
                return Err(self.unsupported(self.at, CALLS));
            }
        }
        if matches!(next, Some(Token::Period)) {
            return Err(self.unsupported(
                self.at,
                "columns are named without their table, fields of structs not at all",
            ));
        }
        let name = word.value.clone();
        self.at += 1;
        Ok(Some(name))
    }

    /// Words that are no columns unless quoted.
    fn is_reserved(&self) -> bool {
        matches!(
            self.keyword(0),
            Some(
                Keyword::AND
                    | Keyword::OR
                    | Keyword::NOT
                    | Keyword::IN
                    | Keyword::IS
                    | Keyword::BETWEEN
                    | Keyword::NULL
                    | Keyword::TRUE
                    | Keyword::FALSE
                    | Keyword::SELECT
            )
        )
    }

    fn literal(&mut self) -> Result<Literal, FilterError> {
        let start = self.at;
        let mut negative = false;
        while let Some(sign @ (Token::Plus | Token::Minus)) = self.peek() {
            negative ^= *sign == Token::Minus;
            self.at += 1;
        }
        let signed = self.at > start;
        let bad = |parser: &Self, problem: String| {
            parser.syntax(&format!(
                "{}: {problem}",
                parser.slice(start, parser.at + 1)
            ))
        };
        let value = match self.peek() {
            None => return Err(self.syntax("it ends where a column or a literal should follow")),
            Some(Token::Number(digits, false)) => match digits.parse::<Number>() {
                Ok(number) => {
                    LiteralValue::Number(if negative { number.negated() } else { number })
                }
                Err(()) => return Err(self.unsupported(start, LITERALS)),
            },
            Some(_) if signed => return Err(self.unsupported(start, LITERALS)),
            Some(Token::SingleQuotedString(text)) => LiteralValue::Text(text.clone()),
            Some(Token::HexStringLiteral(digits)) => match decode_hex(digits) {
                Some(bytes) => LiteralValue::Bytes(bytes),
                None => {
                    return Err(bad(
                        self,
                        "hexadecimal digits are pairs of 0-9, a-f".to_owned(),
                    ));
                }
            },
            Some(Token::Word(_)) => match self.keyword(0) {
                Some(Keyword::TRUE) => LiteralValue::Boolean(true),
                Some(Keyword::FALSE) => LiteralValue::Boolean(false),
                Some(Keyword::NULL) => return Err(self.unsupported(start, NULLS)),
                Some(kind @ (Keyword::TIMESTAMP | Keyword::DATE)) => {
                    let Some(Token::SingleQuotedString(moment)) =
                        self.tokens.get(self.at + 1).map(|t| &t.token)
                    else {
                        return Err(self.unsupported(start, LITERALS));
                    };
                    let read = if kind == Keyword::DATE {
                        parse_date(moment)
                    } else {
                        parse_moment(moment)
                    };
                    self.at += 1;
                    match read {
                        Ok(nanos) => LiteralValue::Moment(nanos),
                        Err(problem) => return Err(bad(self, problem)),
                    }
                }
                _ => return Err(self.unsupported(start, LITERALS)),
            },
            Some(Token::RParen | Token::Comma) => {
                return Err(self.syntax(&format!(
                    "a column or a literal is missing before `{}`",
                    self.slice(self.at, self.at + 1)
                )));
            }
            Some(_) => return Err(self.unsupported(start, LITERALS)),
        };
        self.at += 1;
        // Not `slice`, which counts from the start of the text: lists may be long.
        let mut text = String::new();
        let mut signs_only = true;
        for token in self.tokens.get(start..self.at).unwrap_or_default() {
            if !signs_only {
                text.push(' ');
            }
            text.push_str(&token.token.to_string());
            signs_only &= matches!(token.token, Token::Plus | Token::Minus);
        }
        Ok(Literal {
            text: cut(text),
            value,
        })
    }

    fn syntax(&self, problem: &str) -> FilterError {
        FilterError::Syntax {
            problem: problem.to_owned(),
        }
    }

    /// Refuses the condition that began at token `start`, up to where the next could begin.
    fn unsupported(&self, start: usize, expected: &'static str) -> FilterError {
        let mut end = start;
        let mut open = 0usize;
        while let Some(token) = self.tokens.get(end) {
            match &token.token {
                Token::LParen => open += 1,
                Token::RParen | Token::Comma if open == 0 && end > self.at => break,
                Token::RParen => open = open.saturating_sub(1),
                Token::Word(word)
                    if open == 0
                        && end > self.at
                        && word.quote_style.is_none()
                        && matches!(word.keyword, Keyword::AND | Keyword::OR) =>
                {
                    break;
                }
                _ => {}
            }
            end += 1;
        }
        FilterError::Unsupported {
            fragment: self.slice(start, end),
            expected,
        }
    }

    /// The text of tokens `start..end`, cut when long.
    fn slice(&self, start: usize, end: usize) -> String {
        let end = end.min(self.tokens.len());
        let (Some(first), Some(last)) = (
            self.tokens.get(start),
            self.tokens.get(end.saturating_sub(1)),
        ) else {
            return String::new();
        };
        let from = offset(self.text, first.span.start);
        let to = offset(self.text, last.span.end);
        cut(self.text.get(from..to).unwrap_or_default().to_owned())
    }
}

/// The text, or its beginning when long.
fn cut(mut text: String) -> String {
    if let Some((at, _)) = text.char_indices().nth(MAX_FRAGMENT_CHARS) {
        text.truncate(at);
        text.push_str("...");
    }
    text
}

/// Byte offset of a place that the tokenizer names by line and character, both from 1.
fn offset(text: &str, place: Location) -> usize {
    let line = usize::try_from(place.line)
        .unwrap_or(usize::MAX)
        .saturating_sub(1);
    let column = usize::try_from(place.column)
        .unwrap_or(usize::MAX)
        .saturating_sub(1);
    let line_start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
    let rest = text.get(line_start..).unwrap_or_default();
    line_start
        + rest
            .char_indices()
            .nth(column)
            .map_or(rest.len(), |(at, _)| at)
}

fn negate(condition: Condition, negated: bool) -> Condition {
    if negated {
        Condition::Not(Box::new(condition))
    } else {
        condition
    }
}

fn compare_op(token: &Token) -> Option<CompareOp> {
    Some(match token {
        Token::Eq => CompareOp::Eq,
        Token::Neq => CompareOp::NotEq,
        Token::Lt => CompareOp::Lt,
        Token::LtEq => CompareOp::LtEq,
        Token::Gt => CompareOp::Gt,
        Token::GtEq => CompareOp::GtEq,
        _ => return None,
    })
}

/// The operator that says the same with its sides exchanged.
fn flip(op: CompareOp) -> CompareOp {
    match op {
        CompareOp::Lt => CompareOp::Gt,
        CompareOp::LtEq => CompareOp::GtEq,
        CompareOp::Gt => CompareOp::Lt,
        CompareOp::GtEq => CompareOp::LtEq,
        CompareOp::Eq | CompareOp::NotEq => op,
    }
}

fn decode_hex(digits: &str) -> Option<Vec<u8>> {
    let nibbles = digits
        .chars()
        .map(|c| c.to_digit(16))
        .collect::<Option<Vec<u32>>>()?;
    if nibbles.len() % 2 != 0 {
        return None;
    }
    nibbles
        .chunks_exact(2)
        .map(|pair| u8::try_from(pair[0] * 16 + pair[1]).ok())
        .collect()
}
