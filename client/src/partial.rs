//! Replies whose deadline passed before all keys were looked for.
//!
//! The server says so beside the rows. The mark travels with them, under the name that
//! Pinion's Python client gives it too, so that whoever gets the batch can ask.

use std::sync::Arc;

use arrow_array::RecordBatch;
use serde_json::Value;

use crate::error::{ClientError, Result};

/// Metadata of the schema of such a reply.
const MARK: &str = "pinion.partial";

/// Whether a lookup's deadline passed before all keys were looked for: those that were not are
/// [`NOT_READ`](crate::status::NOT_READ), and their values null (with
/// [`defaults`](crate::Lookup::defaults), the default).
///
/// For the replies of this crate's lookups, whichever way they came.
pub fn is_partial(reply: &RecordBatch) -> bool {
    reply
        .schema_ref()
        .metadata()
        .get(MARK)
        .is_some_and(|mark| mark == "true")
}

/// What a reply's JSON says of it.
pub(crate) fn says_partial(about: &Value) -> bool {
    about.get("partial").and_then(Value::as_bool) == Some(true)
}

/// The rows with the mark, when `partial`; else as they are.
pub(crate) fn marked(rows: RecordBatch, partial: bool) -> Result<RecordBatch> {
    if !partial {
        return Ok(rows);
    }
    let mut schema = rows.schema_ref().as_ref().clone();
    schema.metadata.insert(MARK.to_owned(), "true".to_owned());
    rows.with_schema(Arc::new(schema))
        .map_err(ClientError::decode)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use arrow_array::{ArrayRef, Int64Array};
    use arrow_schema::{DataType, Field, Schema};
    use serde_json::json;

    use super::*;

    #[test]
    fn the_mark_is_added_to_what_a_schema_says_already() {
        let schema = Schema::new(vec![Field::new("id", DataType::Int64, false)])
            .with_metadata(HashMap::from([("owner".to_owned(), "search".to_owned())]));
        let column: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let rows = RecordBatch::try_new(Arc::new(schema), vec![column]).unwrap();
        let whole = marked(rows.clone(), false).unwrap();
        assert_eq!((is_partial(&whole), &whole), (false, &rows));
        let partial = marked(rows.clone(), true).unwrap();
        assert!(is_partial(&partial));
        assert_eq!(partial.schema_ref().metadata()["owner"], "search");
        assert_eq!(partial.columns(), rows.columns());
    }

    #[test]
    fn only_true_says_partial() {
        assert!(says_partial(&json!({"partial": true, "table": "t"})));
        for about in [
            json!(null),
            json!({}),
            json!({"partial": false}),
            json!({"partial": 1}),
            json!([true]),
        ] {
            assert!(!says_partial(&about), "{about}");
        }
    }
}
