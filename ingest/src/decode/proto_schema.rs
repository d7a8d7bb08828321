//! Text of .proto files to descriptors, and descriptors to plans of what is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, TimeUnit};
use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};
use protox::Compiler;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

use super::frame::read_place;
use super::registry::Schema;

/// What the file of a schema is called; a name that no import has.
const MAIN_FILE: &str = "pinion/the-schema.proto";
/// Deepest nesting of messages that is read.
const MAX_DEPTH: usize = 16;
/// Most fields in all messages of one plan.
const MAX_FIELDS: usize = 20_000;

/// Files that Confluent's clients know without a registry, as far as they are read.
const WELL_KNOWN: &[(&str, &str)] = &[
    (
        "confluent/meta.proto",
        "syntax = \"proto3\"; package confluent; import \"google/protobuf/descriptor.proto\";
         message Meta { string doc = 1; map<string, string> params = 2; repeated string tags = 3; }
         extend google.protobuf.FileOptions { Meta file_meta = 1088; }
         extend google.protobuf.MessageOptions { Meta message_meta = 1088; }
         extend google.protobuf.FieldOptions { Meta field_meta = 1088; }
         extend google.protobuf.EnumOptions { Meta enum_meta = 1088; }
         extend google.protobuf.EnumValueOptions { Meta enum_value_meta = 1088; }",
    ),
    (
        "confluent/type/decimal.proto",
        "syntax = \"proto3\"; package confluent.type;
         message Decimal { bytes value = 1; uint32 precision = 2; int32 scale = 3; }",
    ),
];

/// Files that came with a schema.
struct Files(Vec<(String, String)>);

impl FileResolver for Files {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        let of = |(_, text): &(String, String)| File::from_source(name, text);
        let own = self.0.iter().find(|(found, _)| found == name).map(of);
        own.or_else(|| {
            WELL_KNOWN
                .iter()
                .find(|(found, _)| *found == name)
                .map(|(_, text)| File::from_source(name, text))
        })
        .unwrap_or_else(|| Err(protox::Error::file_not_found(name)))
    }
}

/// The message that `message` names, or that stands at `place` in its file.
///
/// # Errors
///
/// The text is no schema, rests on a file that is not there, or has no such message.
pub(crate) fn message_of(
    schema: &Schema,
    message: Option<&str>,
    place: &[u8],
) -> Result<MessageDescriptor, String> {
    let mut files = vec![(MAIN_FILE.to_owned(), schema.text.clone())];
    files.extend(schema.references.iter().cloned());
    let mut resolver = ChainFileResolver::new();
    resolver.add(Files(files));
    resolver.add(GoogleFileResolver::new());
    let mut compiler = Compiler::with_file_resolver(resolver);
    compiler
        .include_imports(true)
        .include_source_info(false)
        .open_file(MAIN_FILE)
        .map_err(|e| format!("the schema cannot be read: {e}"))?;
    let pool: DescriptorPool = compiler.descriptor_pool();
    if let Some(name) = message {
        return pool
            .get_message_by_name(name)
            .ok_or_else(|| format!("it has no message {name}"));
    }
    let file = pool
        .get_file_by_name(MAIN_FILE)
        .ok_or("the schema cannot be read")?;
    let indexes = read_place(&mut &*place)?;
    let absent = || format!("it has no message at {indexes:?}");
    let (first, below) = indexes.split_first().ok_or_else(absent)?;
    let mut found = file.messages().nth(*first).ok_or_else(absent)?;
    for index in below {
        let child = found.child_messages().nth(*index).ok_or_else(absent)?;
        found = child;
    }
    Ok(found)
}

/// How a value stands on the wire, and what it becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    Double,
    Float,
    Int32,
    Int64,
    UInt32,
    UInt64,
    SInt32,
    SInt64,
    Fixed32,
    Fixed64,
    SFixed32,
    SFixed64,
    Bool,
    String,
    Bytes,
}

impl Scalar {
    /// Wire type of one value.
    pub(crate) fn wire_type(self) -> u8 {
        match self {
            Scalar::Double | Scalar::Fixed64 | Scalar::SFixed64 => 1,
            Scalar::Float | Scalar::Fixed32 | Scalar::SFixed32 => 5,
            Scalar::String | Scalar::Bytes => 2,
            _ => 0,
        }
    }

    fn data_type(self) -> DataType {
        match self {
            Scalar::Double => DataType::Float64,
            Scalar::Float => DataType::Float32,
            Scalar::Int32 | Scalar::SInt32 | Scalar::SFixed32 => DataType::Int32,
            Scalar::Int64 | Scalar::SInt64 | Scalar::SFixed64 => DataType::Int64,
            Scalar::UInt32 | Scalar::Fixed32 => DataType::UInt32,
            Scalar::UInt64 | Scalar::Fixed64 => DataType::UInt64,
            Scalar::Bool => DataType::Boolean,
            Scalar::String => DataType::Utf8,
            Scalar::Bytes => DataType::Binary,
        }
    }
}

/// What a field holds.
#[derive(Debug, Clone)]
pub(crate) enum Shape {
    Scalar(Scalar),
    /// Number to name.
    Enum(Arc<BTreeMap<i32, String>>),
    Message(MessagePlan),
    /// `google.protobuf.Timestamp`: a timestamp in nanoseconds.
    Timestamp,
    /// `google.protobuf.Duration`: a duration in nanoseconds.
    Duration,
    /// `google.protobuf.Int64Value` and its like: a value that may be null.
    Wrapper(Scalar),
}

impl Shape {
    pub(crate) fn data_type(&self) -> DataType {
        match self {
            Shape::Scalar(scalar) | Shape::Wrapper(scalar) => scalar.data_type(),
            Shape::Enum(_) => DataType::Utf8,
            Shape::Message(plan) => DataType::Struct(plan.arrow_fields()),
            Shape::Timestamp => DataType::Timestamp(TimeUnit::Nanosecond, Some("UTC".into())),
            Shape::Duration => DataType::Duration(TimeUnit::Nanosecond),
        }
    }

    /// Wire type of one value.
    pub(crate) fn wire_type(&self) -> u8 {
        match self {
            Shape::Scalar(scalar) => scalar.wire_type(),
            Shape::Enum(_) => 0,
            _ => 2,
        }
    }
}

/// A field that is read.
#[derive(Debug, Clone)]
pub(crate) struct FieldPlan {
    pub(crate) name: String,
    pub(crate) number: u32,
    pub(crate) shape: Shape,
    pub(crate) repeated: bool,
    /// Absent is null; else absent is zero, empty or false.
    pub(crate) nullable: bool,
}

impl FieldPlan {
    pub(crate) fn arrow_field(&self) -> Field {
        let data_type = self.shape.data_type();
        if self.repeated {
            let item = Field::new("item", data_type, true);
            Field::new(&self.name, DataType::List(Arc::new(item)), true)
        } else {
            Field::new(&self.name, data_type, true)
        }
    }
}

/// The fields of a message that are read.
#[derive(Debug, Clone, Default)]
pub(crate) struct MessagePlan {
    pub(crate) fields: Vec<FieldPlan>,
}

impl MessagePlan {
    pub(crate) fn arrow_fields(&self) -> Fields {
        self.fields.iter().map(FieldPlan::arrow_field).collect()
    }

    /// The plan for `message` that covers the dotted paths in `wanted`; all of it for `None`.
    ///
    /// # Errors
    ///
    /// More fields or levels than are read.
    pub(crate) fn new(
        message: &MessageDescriptor,
        wanted: Option<&[Vec<String>]>,
    ) -> Result<MessagePlan, String> {
        let mut budget = MAX_FIELDS;
        let wanted = wanted.map(|paths| paths.iter().map(Vec::as_slice).collect::<Vec<_>>());
        plan_message(message, wanted.as_deref(), &mut Vec::new(), &mut budget)
    }
}

fn plan_message(
    message: &MessageDescriptor,
    wanted: Option<&[&[String]]>,
    above: &mut Vec<String>,
    budget: &mut usize,
) -> Result<MessagePlan, String> {
    let mut plan = MessagePlan::default();
    above.push(message.full_name().to_owned());
    for field in message.fields() {
        let below: Option<Vec<&[String]>> = match wanted {
            None => None,
            Some(paths) => {
                let below: Vec<&[String]> = paths
                    .iter()
                    .filter_map(|path| path.split_first())
                    .filter(|(step, _)| *step == field.name())
                    .map(|(_, rest)| rest)
                    .collect();
                if below.is_empty() {
                    continue;
                }
                // A path that ends here reads the field whole.
                (!below.iter().any(|rest| rest.is_empty())).then_some(below)
            }
        };
        // A map is no column type, and a message inside itself has no end.
        if field.is_map() || above.len() > MAX_DEPTH {
            continue;
        }
        let Some(shape) = shape_of(&field, below.as_deref(), above, budget)? else {
            continue;
        };
        *budget = budget
            .checked_sub(1)
            .ok_or_else(|| format!("it has more than {MAX_FIELDS} fields"))?;
        plan.fields.push(FieldPlan {
            name: field.name().to_owned(),
            number: field.number(),
            shape,
            repeated: field.is_list(),
            nullable: field.supports_presence(),
        });
    }
    above.pop();
    Ok(plan)
}

fn shape_of(
    field: &FieldDescriptor,
    below: Option<&[&[String]]>,
    above: &mut Vec<String>,
    budget: &mut usize,
) -> Result<Option<Shape>, String> {
    Ok(Some(match field.kind() {
        Kind::Message(message) => {
            if let Some(shape) = well_known(message.full_name()) {
                return Ok(Some(shape));
            }
            if field.is_group()
                || (below.is_none() && above.iter().any(|n| n == message.full_name()))
            {
                return Ok(None);
            }
            Shape::Message(plan_message(&message, below, above, budget)?)
        }
        Kind::Enum(of) => Shape::Enum(Arc::new(
            of.values()
                .map(|value| (value.number(), value.name().to_owned()))
                .collect(),
        )),
        Kind::Double => Shape::Scalar(Scalar::Double),
        Kind::Float => Shape::Scalar(Scalar::Float),
        Kind::Int32 => Shape::Scalar(Scalar::Int32),
        Kind::Int64 => Shape::Scalar(Scalar::Int64),
        Kind::Uint32 => Shape::Scalar(Scalar::UInt32),
        Kind::Uint64 => Shape::Scalar(Scalar::UInt64),
        Kind::Sint32 => Shape::Scalar(Scalar::SInt32),
        Kind::Sint64 => Shape::Scalar(Scalar::SInt64),
        Kind::Fixed32 => Shape::Scalar(Scalar::Fixed32),
        Kind::Fixed64 => Shape::Scalar(Scalar::Fixed64),
        Kind::Sfixed32 => Shape::Scalar(Scalar::SFixed32),
        Kind::Sfixed64 => Shape::Scalar(Scalar::SFixed64),
        Kind::Bool => Shape::Scalar(Scalar::Bool),
        Kind::String => Shape::Scalar(Scalar::String),
        Kind::Bytes => Shape::Scalar(Scalar::Bytes),
    }))
}

fn well_known(message: &str) -> Option<Shape> {
    Some(match message.strip_prefix("google.protobuf.")? {
        "Timestamp" => Shape::Timestamp,
        "Duration" => Shape::Duration,
        "DoubleValue" => Shape::Wrapper(Scalar::Double),
        "FloatValue" => Shape::Wrapper(Scalar::Float),
        "Int64Value" => Shape::Wrapper(Scalar::Int64),
        "UInt64Value" => Shape::Wrapper(Scalar::UInt64),
        "Int32Value" => Shape::Wrapper(Scalar::Int32),
        "UInt32Value" => Shape::Wrapper(Scalar::UInt32),
        "BoolValue" => Shape::Wrapper(Scalar::Bool),
        "StringValue" => Shape::Wrapper(Scalar::String),
        "BytesValue" => Shape::Wrapper(Scalar::Bytes),
        _ => return None,
    })
}
