-- The table of all examples; safe to run again.
CREATE TABLE IF NOT EXISTS orders (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, total numeric(10,2) NOT NULL, card_number text
);
-- What the examples write.
CREATE TABLE IF NOT EXISTS invoices (order_id bigint PRIMARY KEY, total numeric(10,2) NOT NULL);
CREATE TABLE IF NOT EXISTS order_search (order_id bigint PRIMARY KEY, words tsvector NOT NULL);
