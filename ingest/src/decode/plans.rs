//! Which schema each record follows, and what was made of that schema: once per schema.

use std::sync::Arc;

use super::Item;
use super::frame::{SchemaId, unframe};
use super::registry::{Language, Registry, Schema};

/// Where schemas come from.
#[derive(Debug, Clone)]
pub(crate) enum Schemas {
    /// Every record names its own.
    Registry(Arc<Registry>),
    /// All records follow this one, and have no frame.
    Bare(Arc<Schema>),
}

/// What a format makes of the schemas that it met.
#[derive(Debug)]
pub(crate) struct Plans<R> {
    schemas: Schemas,
    language: Language,
    plans: Vec<Plan<R>>,
}

/// One schema, and what reads by it.
#[derive(Debug)]
pub(crate) struct Plan<R> {
    id: Option<SchemaId>,
    place: Vec<u8>,
    /// The reader, or why the schema is none that can be read by.
    reader: Result<R, String>,
}

/// Records of one schema, in order.
pub(crate) struct Sorted<'p, 'r, R> {
    /// What to call the schema in a dead letter.
    pub(crate) label: String,
    pub(crate) reader: &'p mut R,
    pub(crate) bodies: Vec<(usize, &'r [u8])>,
}

/// Record and reason.
pub(crate) type Refused = Vec<(usize, String)>;

impl<R> Plans<R> {
    pub(crate) fn new(schemas: Schemas, language: Language) -> Plans<R> {
        Plans {
            schemas,
            language,
            plans: Vec::new(),
        }
    }

    /// Groups records by their schema. What has a broken frame, or a schema that nothing can be
    /// read by, is refused.
    ///
    /// # Errors
    ///
    /// A schema is not here yet: why. Nothing was decided then.
    pub(crate) fn sort<'p, 'r>(
        &'p mut self,
        items: &[Item<'r>],
        build: impl Fn(&Schema, &[u8]) -> Result<R, String>,
    ) -> Result<(Vec<Sorted<'p, 'r, R>>, Refused), String> {
        let mut refused = Refused::new();
        // Record, place in `plans`, body.
        let mut placed: Vec<(usize, usize, &'r [u8])> = Vec::with_capacity(items.len());
        match &self.schemas {
            Schemas::Bare(schema) => {
                if self.plans.is_empty() {
                    self.plans.push(Plan {
                        id: None,
                        place: Vec::new(),
                        reader: build(schema, &[]),
                    });
                }
                placed.extend(items.iter().map(|item| (item.record, 0, item.bytes)));
            }
            Schemas::Registry(registry) => {
                let registry = Arc::clone(registry);
                let has_place = self.language == Language::Protobuf;
                let mut framed = Vec::with_capacity(items.len());
                for item in items {
                    match unframe(item.bytes, item.frame_header, has_place) {
                        Ok(frame) => framed.push((item.record, frame)),
                        Err(problem) => refused.push((item.record, problem)),
                    }
                }
                // All at once, so that one wait is enough for several.
                for (_, frame) in &framed {
                    if self.plan_of(frame.id, frame.place).is_none() {
                        registry.prefetch(frame.id);
                    }
                }
                for (record, frame) in framed {
                    let plan = match self.plan_of(frame.id, frame.place) {
                        Some(plan) => plan,
                        None => {
                            let schema = registry.schema(frame.id)?;
                            let reader = self
                                .check_language(&schema)
                                .and_then(|()| build(&schema, frame.place));
                            self.plans.push(Plan {
                                id: Some(frame.id),
                                place: frame.place.to_vec(),
                                reader,
                            });
                            self.plans.len() - 1
                        }
                    };
                    placed.push((record, plan, frame.body));
                }
            }
        }
        let mut bodies: Vec<Vec<(usize, &'r [u8])>> = vec![Vec::new(); self.plans.len()];
        for (record, plan, body) in placed {
            if let Some(of_plan) = bodies.get_mut(plan) {
                of_plan.push((record, body));
            }
        }
        let mut sorted = Vec::new();
        for (plan, bodies) in self.plans.iter_mut().zip(bodies) {
            if bodies.is_empty() {
                continue;
            }
            let label = match plan.id {
                Some(id) => format!("schema {id}"),
                None => "the table's schema".to_owned(),
            };
            match &mut plan.reader {
                Ok(reader) => sorted.push(Sorted {
                    label,
                    reader,
                    bodies,
                }),
                Err(problem) => refused.extend(
                    bodies
                        .iter()
                        .map(|(record, _)| (*record, format!("{label}: {problem}"))),
                ),
            }
        }
        Ok((sorted, refused))
    }

    fn plan_of(&self, id: SchemaId, place: &[u8]) -> Option<usize> {
        self.plans
            .iter()
            .position(|plan| plan.id == Some(id) && plan.place == place)
    }

    fn check_language(&self, schema: &Schema) -> Result<(), String> {
        if schema.language == self.language {
            return Ok(());
        }
        Err(format!(
            "it is a schema of {}, and {} is due",
            schema.language, self.language
        ))
    }
}
